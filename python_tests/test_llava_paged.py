"""The thin model over a paged cache: what it says over a dense one, in the blocks that it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from llava_case import IMAGES, PROMPTS, SECOND, SECOND_IMAGES
from replay import Captures, by_address
from tiny_checkpoints import make_checkpoint

from adsc_kernels import graphs
from adsc_kernels.attention import varlen_attention
from adsc_kernels.attention_keys import CachedKeys, PagedKeys
from adsc_kernels.cache import KVCache, Phase
from adsc_kernels.llava import Llava
from adsc_kernels.paged_cache import PagedStageCache
from adsc_kernels.plan import make_plan
from adsc_kernels.sampling import Inbox
from adsc_kernels.schedule import CompressionSchedule

SCHEDULES = ["", "1:1/2,3:1/3", "0:2/3,1:1/2,4:0@linspace@renumber"]
SIZE = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llava:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, seed=5, layers=5, kv_heads=2, grid=5)
    return Llava.from_pretrained(folder, device="cpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adsc_kernels.llava.generate.BLOCK_SIZE", SIZE)


def answers(model: Llava, cache: str, chunk: int | None = None, early: bool = False) -> list:
    """Tokens of three turns, the second behind a compaction of the first's pictures."""
    options = {"max_new_tokens": 6, "prefill_chunk": chunk, "compact_early_layers": early}
    first = model.generate(PROMPTS, IMAGES, cache=cache, **options)
    talk = first.conversation
    second = model.generate(SECOND, SECOND_IMAGES, conversation=talk, **options)
    talk.compact_images(older_than=1, keep="1/2")
    third = model.generate(["w7 w8"] * len(PROMPTS), conversation=talk, **options)
    assert (talk.cache.block_size == SIZE) == (cache == "paged")
    return [turn.token_ids for turn in (first, second, third)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("chunk", "early"), [(None, False), (7, False), (None, True)])
def test_tokens_equal_those_of_a_dense_cache(model, schedule, chunk, early):
    twin = model.with_schedule(schedule)
    assert answers(twin, "paged", chunk, early) == answers(twin, "dense", chunk, early)


@pytest.mark.parametrize("schedule", SCHEDULES[:2])
def test_graphs_over_blocks(model, monkeypatch, schedule):
    """One of the prompts and one of a step, over every cache and batch of the bucket."""
    captures = Captures()
    plain = model.with_schedule(schedule)
    plain.graphs = graphs.Graphs()
    sizes = (3, 4, 3)
    want = [plain.generate(PROMPTS[:n], IMAGES[:n], max_new_tokens=8).token_ids for n in sizes]
    by_address(monkeypatch)
    monkeypatch.setattr(graphs, "capturable", lambda device: True)
    monkeypatch.setattr(graphs, "capture", captures)
    monkeypatch.setattr(Inbox, "late", True)
    kept = [plain.generate(PROMPTS[:n], IMAGES[:n], max_new_tokens=8, cache="paged") for n in sizes]
    assert [answer.token_ids for answer in kept] == want
    steps = [made for made in captures.made if made.inputs[0].dtype is torch.int64]
    assert len(steps) == 1
    assert captures.replays >= 6 + 7 + 7
    dense = plain.generate(PROMPTS[:3], IMAGES[:3], max_new_tokens=8)
    assert dense.token_ids == want[0]  # by a graph of its own, if any


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_as_many_blocks_as_the_plan_takes(model, schedule):
    twin = model.with_schedule(schedule)
    answer = twin.generate(PROMPTS, IMAGES, max_new_tokens=3, cache="paged")
    row = 2 * twin.config.num_kv_heads * twin.config.head_dim * 4
    for stage, plan in zip(answer.conversation.cache.stages, answer.plan.stages, strict=True):
        blocks = sum(-(-(n + 2) // SIZE) for n in plan.seq_lens)
        assert stage.allocated_bytes == blocks * SIZE * row * len(stage.layers)
        assert sorted(block for some in stage.blocks for block in some) == list(range(blocks))
    dense = twin.generate(PROMPTS, IMAGES, max_new_tokens=3)
    assert answer.cache_bytes_per_stage == dense.cache_bytes_per_stage


def test_rows_stay_in_their_blocks_as_sequences_grow():
    """And close up, in their order, when blocks are given back."""
    make = KVCache(CompressionSchedule.dense(2), 2, 1, 1, torch.float32, "cpu", block_size=2)
    stage = make.stages[0]
    assert isinstance(stage, PagedStageCache)
    written: list[list[int]] = [[], []]
    schedule = CompressionSchedule.dense(2)
    for ends in ((3, 2), (4, 5), (9, 6)):
        chunks = list(zip(stage.lens, ends, strict=True))
        plan = make_plan(schedule, [0, 9, 18], [], chunks=chunks).stages[0]
        before = [list(blocks) for blocks in stage.blocks]
        stage.fit(ends)
        for old, new in zip(before, stage.blocks, strict=True):
            assert new[: len(old)] == old
        slots, _ = stage.begin(plan, Phase.LATER_TURN)
        new = [10 * (b + 1) + n for b, (lo, hi) in enumerate(chunks) for n in range(lo, hi)]
        for rows in (*stage.k, *stage.v):
            rows[slots, 0, 0] = torch.tensor(new, dtype=torch.float32)
        stage.lens = ends
        written = [[10 * (b + 1) + n for n in range(end)] for b, end in enumerate(ends)]
        for b, want in enumerate(written):
            assert stage.k[1][stage.slots(b, 0, ends[b]), 0, 0].tolist() == want
    assert stage.blocks == [[0, 1, 5, 6, 7], [2, 3, 4]]
    with pytest.raises(ValueError, match="at least the cached"):
        stage.fit((8, 6))
    stage.lens = (4, 5)
    stage.fit((4, 5))
    assert stage.blocks == [[0, 1], [2, 3, 4]]
    assert stage.allocated_bytes == 2 * 2 * 5 * 2 * 4
    for b, end in enumerate(stage.lens):
        assert stage.v[0][stage.slots(b, 0, end), 0, 0].tolist() == written[b][:end]


@pytest.mark.parametrize(("q_lens", "lens"), [((3, 1, 0, 4), (3, 6, 2, 9)), ((1, 1), (4, 8))])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_attention_over_blocks(q_lens, lens, size):
    """Bit for bit what it is over rows that lie together, in blocks of any order."""
    torch.manual_seed(size)
    counts = [-(-n // size) for n in lens]
    order = np.random.default_rng(size).permutation(sum(counts))
    table = np.full((len(lens), max(counts) + 1), -1, np.int32)
    q, k, v = torch.randn(sum(q_lens), 4, 8), *torch.randn(2, sum(lens), 2, 8)
    paged = torch.full((2, sum(counts) * size, 2, 8), torch.nan)
    first = at = 0
    for b, (n, blocks) in enumerate(zip(lens, counts, strict=True)):
        table[b, :blocks] = order[at : at + blocks]
        rows = np.arange(n)
        slots = table[b, rows // size] * size + rows % size
        for to, rows in zip(paged, (k, v), strict=True):
            to[slots] = rows[first : first + n]
        first, at = first + n, at + blocks
    stage = make_plan(CompressionSchedule.dense(1), np.cumsum([0, *q_lens]), []).stages[0]
    cpu = torch.device("cpu")
    want = varlen_attention(q, k, v, stage, keys=CachedKeys.build(q_lens, lens, lens, cpu))
    keys = PagedKeys.build(lens, size, table, cpu)
    assert torch.equal(varlen_attention(q, *paged, stage, keys=keys), want)


def test_keys_in_blocks_that_do_not_fit():
    q, k = torch.randn(1, 2, 8), torch.randn(8, 2, 8)
    stage = make_plan(CompressionSchedule.dense(1), [0, 1], []).stages[0]
    table, cpu = np.zeros((1, 1), np.int32), torch.device("cpu")
    for lens, size, match in (
        ((5,), 4, "keys: expected a block table of at least"),
        ((3,), 3, "k: expected blocks of 3 rows, got 8"),
        ((0,), 4, "keys: expected at least the rows"),
        ((3, 3), 4, "keys: expected 1 sequences, got 2"),
    ):
        with pytest.raises(ValueError, match=match):
            varlen_attention(q, k, k, stage, keys=PagedKeys.build(lens, size, table, cpu))
    with pytest.raises(ValueError, match="block_size: expected"):
        KVCache(CompressionSchedule.dense(1), 1, 1, 1, torch.float32, "cpu", block_size=0)


def test_a_cache_is_chosen_once(model):
    answer = model.generate(["w1"], max_new_tokens=1, cache="paged")
    with pytest.raises(ValueError, match="cache: expected None for a later turn, got 'dense'"):
        model.generate(["w1"], max_new_tokens=1, cache="dense", conversation=answer.conversation)
    with pytest.raises(ValueError, match="cache: expected one of None, 'dense' or 'paged'"):
        model.generate(["w1"], cache="sparse")
