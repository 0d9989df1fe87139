"""make_plan against the token-by-token oracle."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from cases.plans import plans
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_oracle import survivors

import adsc_kernels as adsc
from adsc_kernels import _C, reference

PATTERN_CODES = {"start": 0, "center": 1, "linspace": 2}


def rows_of(positions: list[list[int]]) -> list[tuple[int, int]]:
    return [(b, p) for b, sequence in enumerate(positions) for p in sequence]


def check_stages(plan, lives, starts) -> None:
    """Every field of every stage, from the positions that live in it."""
    rows = [rows_of(stage) for stage in lives]
    for s, stage in enumerate(plan.stages):
        seq_lens = tuple(len(sequence) for sequence in lives[s])
        assert stage.seq_lens == seq_lens
        assert stage.num_tokens == len(rows[s])
        assert stage.num_tokens_in == len(rows[max(s - 1, 0)])
        assert stage.max_seqlen == max(seq_lens, default=0)
        assert stage.cu_seqlens.dtype == stage.segments.dtype == torch.int32
        assert stage.cu_seqlens.tolist() == np.cumsum([0, *seq_lens]).tolist()
        assert stage.cached_lens == starts[s]
        assert stage.kv_lens == tuple(a + b for a, b in zip(starts[s], seq_lens, strict=True))
        assert stage.max_kv_len == max(stage.kv_lens, default=0)
        before = rows[max(s - 1, 0)]
        assert [before[i] for i in stage.keep_indices().tolist()] == rows[s]
        assert [rows[0][i] for i in stage.token_indices().tolist()] == rows[s]
        assert stage.is_identity == (stage.num_tokens == stage.num_tokens_in)
        dst = stage.segments[:, 0].tolist()
        assert dst == sorted(set(dst))
        if plan.schedule.positions == "original":
            expected = [p for _, p in rows[s]]
        else:
            expected = [
                start + i for start, n in zip(starts[s], seq_lens, strict=True) for i in range(n)
            ]
        assert stage.positions.tolist() == expected


@settings(max_examples=200, deadline=None)
@given(plans(), st.data())
def test_spans_in_any_order_with_empty_ones_among_them(case, data):
    schedule, cu_seqlens, spans = case
    if schedule.pattern != "grid":
        places = [(b, at) for b, start, n, *_ in spans for at in (start, start + n)]
        chosen = data.draw(st.lists(st.sampled_from(places), max_size=4)) if places else []
        spans = [*spans, *((*place, 0) for place in chosen)]
    plan = adsc.make_plan(schedule, cu_seqlens, sorted(spans))
    other = adsc.make_plan(schedule, cu_seqlens, data.draw(st.permutations(spans)))
    for one, two in zip(plan.stages, other.stages, strict=True):
        assert torch.equal(one.segments, two.segments)
        assert one.seq_lens == two.seq_lens


@pytest.mark.parametrize("policy", ["original", "renumber"])
@pytest.mark.parametrize("read", [False, True])
def test_positions_read_inside_a_graph(policy, read):
    schedule = adsc.CompressionSchedule.parse(f"1:1/2,2:1/2@{policy}", 3)
    layout = ([0, 20, 20, 50], [(0, 2, 10), (2, 3, 20)])
    chunks = [(4, 20), (0, 0), (0, 30)]
    for index in range(3):
        torch._dynamo.reset()
        stage, want = (
            adsc.make_plan(schedule, *layout, chunks=chunks).stages[index] for _ in range(2)
        )
        if read:
            _ = stage.positions
        compiled = torch.compile(
            lambda x, stage: (x + stage.positions, stage.max_kv_len, stage.kv_lens),
            fullgraph=True,
            backend="eager",
        )
        got, longest, lens = compiled(torch.zeros(stage.num_tokens, dtype=torch.int64), stage)
        assert torch.equal(got, want.positions)
        assert (longest, lens) == (want.max_kv_len, want.kv_lens)


def test_a_plan_on_meta_has_its_shapes():
    schedule = adsc.CompressionSchedule.parse("1:1/2", 3)
    here, meta = (
        adsc.make_plan(schedule, [0, 20], [(0, 2, 10)], device=d).stages[1] for d in ("cpu", "meta")
    )
    assert meta.segments.device.type == meta.positions.device.type == "meta"
    assert meta.segments.shape == here.segments.shape
    assert meta.positions.shape == meta.keep_indices().shape == here.positions.shape


@settings(deadline=None)
@given(plans())
def test_whole_prompts(case):
    schedule, cu_seqlens, spans = case
    plan = adsc.make_plan(schedule, cu_seqlens, spans)
    batch = len(cu_seqlens) - 1
    assert plan.num_sequences == batch
    lives = survivors(schedule, cu_seqlens, spans)
    check_stages(plan, lives, [(0,) * batch] * schedule.num_stages)
    for i in range(schedule.num_stages):
        for j in range(i, schedule.num_stages):
            mapping = plan.between(i, j)
            source, target = rows_of(lives[i]), rows_of(lives[j])
            assert [source[r] for r in mapping.keep_indices().tolist()] == target
            assert (mapping.num_tokens_in, mapping.num_tokens) == (len(source), len(target))


@settings(deadline=None)
@given(plans(), st.data())
def test_chunks_join_to_the_whole(case, data):
    """For any cuts: each chunk holds the whole prompt's survivors there, and knows the earlier."""
    schedule, cu_seqlens, spans = case
    # A grid of these sizes seldom fits a block; test_a_grid_is_not_rounded has those.
    aligned = schedule.pattern != "grid" and data.draw(st.booleans())
    block = data.draw(st.integers(1, 9)) if aligned else 1
    options = dict(block_size=block, align="block") if aligned else {}
    lives = survivors(schedule, cu_seqlens, spans, block)
    lengths = np.diff(cu_seqlens).tolist()
    begins = [0] * len(lengths)
    while True:
        ends = [data.draw(st.integers(b, n)) for b, n in zip(begins, lengths, strict=True)]
        plan = adsc.make_plan(
            schedule, cu_seqlens, spans, chunks=list(zip(begins, ends, strict=True)), **options
        )
        inside = [
            [
                [p for p in sequence if begin <= p < end]
                for sequence, begin, end in zip(stage, begins, ends, strict=True)
            ]
            for stage in lives
        ]
        cached = [
            tuple(
                sum(p < begin for p in sequence)
                for sequence, begin in zip(stage, begins, strict=True)
            )
            for stage in lives
        ]
        check_stages(plan, inside, cached)
        if ends == lengths:
            break
        # A sequence whose chunk took nothing moves on unrun, so that the cuts come to an end.
        begins = [
            data.draw(st.integers(e, n)) if e == b else e
            for b, e, n in zip(begins, ends, lengths, strict=True)
        ]


@settings(deadline=None)
@given(plans(patterns=("start", "center", "linspace")))
def test_kept_counts(case):
    schedule, cu_seqlens, spans = case
    plan = adsc.make_plan(schedule, cu_seqlens, spans)
    for s, stage in enumerate(plan.stages):
        dropped = 0
        for span in spans:
            count = span[2] if len(span) == 3 else span[3] * span[4]
            kept = schedule.kept(count)
            dropped += kept[0] - kept[s]
        assert stage.num_tokens == cu_seqlens[-1] - dropped


@settings(deadline=None)
@given(plans(patterns=("start", "center", "linspace")), st.integers(1, 40))
def test_aligned_spans_drop_whole_blocks(case, block):
    schedule, cu_seqlens, spans = case
    plan = adsc.make_plan(schedule, cu_seqlens, spans, block_size=block, align="block")
    lives = survivors(schedule, cu_seqlens, spans, block)
    check_stages(plan, lives, [(0,) * (len(cu_seqlens) - 1)] * schedule.num_stages)
    rounded = {(r.span, r.stage): r for r in plan.rounded}
    assert len(rounded) == len(plan.rounded)
    for span in spans:
        count = span[2] if len(span) == 3 else span[3] * span[4]
        first, last = span[1], span[1] + span[2]
        for s, wanted in enumerate(schedule.kept(count)):
            kept = sum(first <= p < last for p in lives[s][span[0]]) - (span[2] - count)
            assert (count - kept) % block == 0
            assert wanted <= kept < wanted + block
            record = rounded.pop((tuple(span[:3]), s), None)
            assert (kept != wanted) == (record is not None)
            if record is not None:
                assert (record.wanted, record.kept) == (wanted, kept)
    assert not rounded


def test_rounding_does_not_add_up():
    schedule = adsc.CompressionSchedule.parse("8:1/4,16:1/4,24:1/4", 32)
    plan = adsc.make_plan(schedule, [0, 677], [(0, 35, 576)], block_size=16, align="block")
    assert [stage.num_tokens - 101 for stage in plan.stages] == [576, 144, 48, 16]  # 144, 36, 9
    assert plan.rounded == (((0, 35, 576), 2, 36, 48), ((0, 35, 576), 3, 9, 16))
    assert adsc.make_plan(schedule, [0, 677], [(0, 35, 576)], block_size=16).rounded == ()
    # Half of the 55 that stay in stage 1 would be 28, and so 40 for the sake of blocks.
    halves = adsc.CompressionSchedule.parse("0:1/2,1:1/2", 2)
    plan = adsc.make_plan(halves, [0, 100], [(0, 0, 100)], block_size=15, align="block")
    assert [stage.num_tokens for stage in plan.stages] == [100, 55, 25]


def test_a_grid_is_not_rounded():
    schedule = adsc.CompressionSchedule.parse("8:1/2x1/2,16:1/2x1/2@grid", 32)
    layout = dict(cu_seqlens=[0, 677], vision_spans=[(0, 35, 576, 24, 24)], align="block")
    fits = adsc.make_plan(schedule, **layout, block_size=4)
    assert [stage.num_tokens - 101 for stage in fits.stages] == [576, 144, 36]
    with pytest.raises(
        adsc.UnsupportedError, match=r"align: .* multiple of 16 .* 36 kept in stage 2"
    ):
        adsc.make_plan(schedule, **layout, block_size=16)


def test_keep_rule_twins_agree():
    """C++, Python and the definition by sets, for every m <= n <= 40 and every cut."""
    for pattern, code in PATTERN_CODES.items():
        for n in range(41):
            for m in range(n + 1):
                kept = [_C.kept_index(code, j, n, m) for j in range(m)]
                assert kept == [reference.kept_index(pattern, j, n, m) for j in range(m)]
                assert all(0 <= k < n for k in kept)
                assert all(a < b for a, b in pairwise(kept))
                for x in range(n + 1):
                    before = sum(k < x for k in kept)
                    assert _C.kept_before(code, x, n, m) == before
                    assert reference.kept_before(pattern, x, n, m) == before


@pytest.mark.parametrize("pattern", PATTERN_CODES)
@pytest.mark.parametrize("m", [1, 2, 3, 2**30 + 7, 2**31 - 2, 2**31 - 1])
def test_keep_rule_does_not_overflow(pattern, m):
    n = 2**31 - 1
    code = PATTERN_CODES[pattern]
    for j in {0, min(1, m - 1), m // 2, m - 1}:
        index = reference.kept_index(pattern, j, n, m)
        assert 0 <= index < n
        assert _C.kept_index(code, j, n, m) == index
        assert _C.kept_before(code, index, n, m) == j
        assert _C.kept_before(code, index + 1, n, m) == j + 1


def test_aligned_counts_agree():
    for n in range(41):
        for m in range(n + 1):
            for block in range(1, 20):
                kept = reference.aligned_kept_count(n, m, block)
                assert _C.aligned_kept_count(n, m, block) == kept
                assert (n - kept) % block == 0
                assert m <= kept < m + block


def test_known_plan():
    schedule = adsc.CompressionSchedule.parse("8:1/4,16:1/4,24:1/4", 32)
    plan = adsc.make_plan(schedule, [0, 677], [(0, 35, 576)], block_size=16)
    assert [stage.num_tokens for stage in plan.stages] == [677, 245, 137, 110]
    assert plan.stages[1].segments.tolist() == [
        [0, 0, 35, 35, 0, 0],
        [35, 35, 576, 144, 0, 0],
        [179, 611, 66, 66, 0, 0],
    ]
    assert [stage.block_counts for stage in plan.stages] == [(43,), (16,), (9,), (7,)]


def test_text_costs_one_segment():
    schedule = adsc.CompressionSchedule.parse("0:1/4,1:1/4", 2)
    plan = adsc.make_plan(schedule, [0, 5, 5, 17], [])
    for stage in plan.stages:
        assert stage.is_identity
        assert stage.segments.tolist() == [[0, 0, 17, 17, 0, 0]]


def test_newlines_of_dropped_rows_stay():
    schedule = adsc.CompressionSchedule.parse("0:1/2x1/2@grid", 1)
    plan = adsc.make_plan(schedule, [0, 14], [(0, 1, 12, 3, 3)])
    # Rows of three at 1, 5, 9 (the first two stay), newlines at 4, 8, 12, text at 0 and 13
    assert plan.stages[1].token_indices().tolist() == [0, 1, 2, 4, 5, 6, 8, 12, 13]


def test_accepts_host_tensors_and_arrays():
    schedule = adsc.CompressionSchedule.parse("0:1/2", 1)
    spans = [(0, 0, 4)]
    expected = adsc.make_plan(schedule, [0, 6], spans).stages[1].segments
    for convert in (torch.tensor, np.array):
        plan = adsc.make_plan(schedule, convert([0, 6]), convert(spans), chunks=convert([(0, 6)]))
        assert torch.equal(plan.stages[1].segments, expected)


LAYOUT = dict(cu_seqlens=[0, 10, 20], vision_spans=[(0, 2, 4)])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(cu_seqlens=[]), ValueError, "cu_seqlens: expected B \\+ 1"),
        (dict(cu_seqlens=[1, 10, 20]), ValueError, "begin with 0, got 1"),
        (dict(cu_seqlens=[0, 10, 5]), ValueError, "never decrease, got 10 then 5 at sequence 1"),
        (dict(cu_seqlens=[0, 10, 2**31]), ValueError, "2\\^31 - 1 tokens"),
        (dict(cu_seqlens=[0, 10.0, 20]), TypeError, "cu_seqlens: expected ints.* got float"),
        (dict(cu_seqlens=[0, True, 20]), TypeError, "cu_seqlens: expected ints.* got bool"),
        (dict(cu_seqlens=[0, 10, 2**70]), TypeError, "at most 64 bits"),
        (dict(vision_spans=[(0, 2, 4), (0, 5, 2)]), ValueError, "no overlap.*at 2 ends at 6"),
        (dict(vision_spans=[(0, 5, 6)]), ValueError, "inside its sequence of 10 tokens"),
        (dict(vision_spans=[(0, -1, 6)]), ValueError, "inside its sequence"),
        (dict(vision_spans=[(0, 2, -1)]), ValueError, "inside its sequence"),
        (dict(vision_spans=[(0, 2, 2**62)]), ValueError, "inside its sequence"),
        (dict(vision_spans=[(2, 0, 1)]), ValueError, "expected a sequence in 0 to 1"),
        (dict(vision_spans=[(-1, 0, 1)]), ValueError, "expected a sequence in 0 to 1"),
        (dict(vision_spans=[(0, 2)]), ValueError, "entries of 3 or 5 ints, got 2 in entry 0"),
        (dict(vision_spans=[3]), TypeError, "vision_spans: expected a sequence, got int"),
        (dict(vision_spans=[(0, 2, 4, 3, 2)]), ValueError, "height \\* width tokens"),
        (dict(vision_spans=[(0, 2, 4, 0, 2)]), ValueError, "height \\* width tokens"),
        (dict(vision_spans=[(0, 2, 4, 2, 2**62)]), ValueError, "height \\* width tokens"),
        (dict(chunks=[(0, 10)]), ValueError, "chunks: expected one .* 2 sequences, got 1"),
        (dict(chunks=[]), ValueError, "chunks: expected one .* 2 sequences, got 0"),
        (dict(chunks=[(0, 11), (0, 1)]), ValueError, "end <= 10 for sequence 0, got \\(0, 11\\)"),
        (dict(chunks=[(3, 2), (0, 1)]), ValueError, "chunks: expected 0 <= begin <= end"),
        (dict(block_size=0), ValueError, "block_size: expected at least 1, got 0"),
        (dict(align="page"), ValueError, "align: expected one of 'block' or None, got 'page'"),
        (dict(align="block"), ValueError, "align: expected a block_size to go with 'block'"),
        (dict(schedule="0:1/2"), TypeError, "schedule: expected a CompressionSchedule, got str"),
        (
            dict(schedule=adsc.CompressionSchedule.parse("0:1/2x1/2@grid", 1)),
            ValueError,
            "expected a height and a width for pattern 'grid'",
        ),
    ],
)
def test_bad_input(change, error, match):
    arguments = dict(schedule=adsc.CompressionSchedule.parse("0:1/2", 1), **LAYOUT) | change
    with pytest.raises(error, match=match):
        adsc.make_plan(**arguments)


def test_device_tensors_are_refused_without_a_read():
    schedule = adsc.CompressionSchedule.parse("0:1/2", 1)
    with pytest.raises(TypeError, match="cu_seqlens: expected host ints, got a tensor on meta"):
        adsc.make_plan(schedule, torch.empty(2, device="meta"), [])


def test_block_counts_need_a_block_size():
    plan = adsc.make_plan(adsc.CompressionSchedule.dense(1), [0, 1], [])
    with pytest.raises(ValueError, match="block_counts"):
        _ = plan.stages[0].block_counts


@pytest.mark.parametrize("pair", [(1, 0), (-1, 0), (0, 2)])
def test_between_needs_stages_in_order(pair):
    plan = adsc.make_plan(adsc.CompressionSchedule.parse("0:1/2", 1), [0, 1], [])
    with pytest.raises(ValueError, match="between: expected 0 <= i <= j <= 1"):
        plan.between(*pair)
