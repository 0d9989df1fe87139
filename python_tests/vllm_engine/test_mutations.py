"""The tests can fail: each of these mistakes, made on purpose, is caught by comparing answers."""

from __future__ import annotations

from engines import MIXED, answer, check, engine, scheduler_of

from adsc_kernels.integrations.vllm import manager, metadata

SCHEDULE = "2:1/2,4:1/2"


def wrong(llava, **options) -> bool:
    """An answer differs from the oracle's, or an op refuses the rows it is told to move."""
    with engine(llava, SCHEDULE, **options) as llm:
        try:
            check(llava, SCHEDULE, MIXED, answer(llm, MIXED, 6))
        except (AssertionError, ValueError):
            return True
    return False


def test_positions_of_survivors_renumbered(llava, monkeypatch):
    from adsc_kernels.integrations.vllm.model import StagedDecoder

    always = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(StagedDecoder, "_renumbers", always, raising=False)
    assert wrong(llava)


def test_dense_lengths(llava, monkeypatch):
    monkeypatch.setattr(
        metadata.Batch,
        "seq_lens",
        lambda self, dense, tables: self._seq_lens[:, : len(dense)].copy_(dense),
    )
    assert wrong(llava)


def test_too_few_blocks(llava, monkeypatch):
    kept = manager.AdscStageManager._kept
    monkeypatch.setattr(
        manager.AdscStageManager, "_kept", lambda self, name, n: kept(self, name, n) // 2
    )
    assert wrong(llava)


def test_rule_applied_to_chunks(llava, monkeypatch):
    """As if a chunk's part of an image were an image of its own, of as many survivors."""
    plan = metadata.make_plan

    def by_chunk(schedule, lengths, spans, *, chunks, **options):
        made = plan(schedule, lengths, spans, chunks=chunks, **options)
        for stage in made.stages[1:]:
            stage.segments[:, 4] = 0  # number of the first kept row taken
        return made

    monkeypatch.setattr(metadata, "make_plan", by_chunk)
    assert wrong(llava, max_num_batched_tokens=50, max_num_seqs=4)


def test_one_group_for_all_stages(llava, monkeypatch):
    """Every layer in vLLM's own dense group would answer rightly, and save nothing."""
    from vllm.model_executor.layers.attention import Attention

    from adsc_kernels.integrations.vllm.model import StageAttention

    def groups() -> int:
        with engine(llava, SCHEDULE) as llm:
            return len(scheduler_of(llm).kv_cache_config.kv_cache_groups)

    assert groups() == 3
    monkeypatch.setattr(StageAttention, "get_kv_cache_spec", Attention.get_kv_cache_spec)
    assert groups() == 1
