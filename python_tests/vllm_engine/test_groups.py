"""Groups of a stage differ in blocks and slots only: a backend that can says so, and its metadata
is made once for them. The CPU's can't, so it is taught to here, as FLASH_ATTN does it."""

from __future__ import annotations

import copy

import pytest
from engines import MIXED, answer, check, engine, scheduler_of

SCHEDULE = "2:1/2"  # a group of 2 layers, and two of a stage


@pytest.fixture
def builds(monkeypatch):
    """Calls of the backend's `build`, which can update block tables from now on."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder as Builder

    made, build = [], Builder.build

    def update(self, metadata, block_table, slot_mapping):
        updated = copy.copy(metadata)
        updated.block_table, updated.slot_mapping = block_table, slot_mapping
        return updated

    def counted(self, *args, **kwargs):
        made.append(type(self).__name__)
        return build(self, *args, **kwargs)

    monkeypatch.setattr(Builder, "supports_update_block_table", True)
    monkeypatch.setattr(Builder, "update_block_table", update)
    monkeypatch.setattr(Builder, "build", counted)
    return made


def answers(llava) -> None:
    """In chunks, some without a row of some request."""
    with engine(llava, SCHEDULE, max_num_batched_tokens=50, max_num_seqs=4) as llm:
        groups = scheduler_of(llm).kv_cache_config.kv_cache_groups
        assert [len(group.layer_names) for group in groups] == [2, 2, 2]
        check(llava, SCHEDULE, MIXED, answer(llm, MIXED, 6))


def test_built_once_for_a_stage(llava, builds):
    answers(llava)
    of_stages = builds.count("AdscCPUAttentionMetadataBuilder")
    assert 0 < of_stages <= builds.count("CPUAttentionMetadataBuilder")


def test_blocks_of_the_first_group(llava, builds, monkeypatch):
    """The test can fail: one group's keys read in place of another's."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder as Builder

    monkeypatch.setattr(Builder, "update_block_table", lambda self, metadata, *rest: metadata)
    with pytest.raises(AssertionError):
        answers(llava)
