"""rebuild_metadata against the reference and, chained over boundaries, against the planner."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from cases.rebuild_metadata import (
    PATTERNS,
    calls,
    check,
    fractions,
    grid_calls,
    int32,
    layouts,
)
from cases.refused import BY_THE_OP
from cases.refused.rebuild_metadata import BAD_CALLS, CU, GRID, SPANS
from cases.run import on
from cases.segment_tables import by_stage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels import CompressionSchedule, make_plan, ops, reference


@settings(max_examples=200, deadline=None)
@given(calls())
def test_equals_reference(call: tuple[Any, ...]) -> None:
    cu_seqlens, spans, *_ = call
    out = check(call, on("cpu"))
    batch, count = len(cu_seqlens) - 1, len(spans)
    assert out.segments.shape == (batch + 2 * count, 6)
    assert out.spans.shape == (count, 3)
    check_movement(out, int(cu_seqlens[-1]))


@settings(max_examples=200, deadline=None)
@given(grid_calls())
def test_grid_equals_reference(call: tuple[Any, ...]) -> None:
    cu_seqlens, spans, (rows, _), _, height = call
    out = check(call, on("cpu"))
    per_span = 1 + reference.kept_count(height, rows)
    assert len(out.segments) == len(cu_seqlens) - 1 + len(spans) * per_span
    assert torch.equal(out.spans[:, 3] * out.spans[:, 4], out.spans[:, 2])
    check_movement(out, int(cu_seqlens[-1]))


def check_movement(out: ops.Metadata, num_tokens_in: int) -> None:
    """The table drives the op itself, and the small tensors agree with each other."""
    stage = out.stage(num_tokens=int(out.num_tokens), num_tokens_in=num_tokens_in)
    moved = ops.downsample(torch.arange(num_tokens_in), stage)
    assert moved.tolist() == reference.source_rows(*by_stage(stage))
    assert torch.equal(out.cu_seqlens.diff(), out.seq_lens)
    assert int(out.cu_seqlens[-1]) == int(out.num_tokens)
    assert int(out.max_seqlen) == max(out.seq_lens.tolist(), default=0)


@settings(max_examples=100, deadline=None)
@given(
    layout=layouts(smallest=1),
    keeps=st.lists(fractions, min_size=1, max_size=4),
    pattern=st.sampled_from([*PATTERNS, "grid"]),
)
def test_a_chain_equals_the_plan(
    layout: tuple[Tensor, Tensor], keeps: list[Fraction], pattern: str
) -> None:
    cu_seqlens, spans = layout
    grid = pattern == "grid"
    shares = [f"{keep}x{keep}" if grid else str(keep) for keep in keeps]
    text = ",".join(f"{layer}:{share}" for layer, share in enumerate(shares)) + f"@{pattern}"
    schedule = CompressionSchedule.parse(text, num_layers=len(keeps) + 1)
    plan = make_plan(schedule, cu_seqlens.tolist(), spans.tolist())

    if not grid:
        spans = spans[:, :3].contiguous()
    for boundary, before, stage in zip(
        schedule.boundaries, plan.stages, plan.stages[1:], strict=False
    ):
        if grid:
            keep: object = (boundary.keep_rows, boundary.keep_columns)
            out = ops.rebuild_metadata(cu_seqlens, spans, keep, "grid", max_height=6)
        else:
            out = ops.rebuild_metadata(cu_seqlens, spans, boundary.keep, pattern)
        assert torch.equal(out.cu_seqlens, stage.cu_seqlens)
        assert tuple(out.seq_lens.tolist()) == stage.seq_lens
        assert int(out.num_tokens) == stage.num_tokens
        assert int(out.max_seqlen) == stage.max_seqlen
        rebuilt = out.stage(stage.num_tokens, stage.num_tokens_in)
        x = torch.arange(before.num_tokens)
        assert torch.equal(ops.downsample(x, rebuilt), ops.downsample(x, stage))
        cu_seqlens, spans = out.cu_seqlens, out.spans


@pytest.mark.parametrize("keep", ["1/4", (1, 4), Fraction(1, 4), "0.25"])
def test_ways_to_say_a_quarter(keep: object) -> None:
    out = ops.rebuild_metadata(int32([0, 10], 2), int32([0, 1, 8], 1, 3), keep)
    assert out.segments.tolist() == [
        [0, 0, 1, 1, 0, 0],
        [1, 1, 8, 2, 0, 0],
        [3, 9, 1, 1, 0, 0],
    ]
    assert out.spans.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(("keep", "left"), [(0, 2), (1, 10), (0.0, 2), (1.0, 10)])
def test_all_or_nothing(keep: float, left: int) -> None:
    out = ops.rebuild_metadata(int32([0, 10], 2), int32([0, 1, 8], 1, 3), keep)
    assert int(out.num_tokens) == left


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name: str) -> None:
    arguments, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        ops.rebuild_metadata(*arguments)


def test_the_op_itself_checks_too() -> None:
    op = torch.ops.adsc_kernels.rebuild_metadata
    for arguments, message in [
        ((CU.long(), SPANS, [1, 2], "start", 0), "^cu_seqlens: .*int32"),
        ((CU, SPANS[0], [1, 2], "start", 0), r"^spans: .*\[3\]"),
        ((CU, SPANS, [1], "start", 0), "^keep: expected 2 integers, got 1"),
        ((CU, SPANS, [3, 2], "start", 0), "^keep: .*3/2"),
        ((CU, SPANS, [1, 0], "start", 0), "^keep: .*1/0"),
        ((CU, SPANS, [1, 2], "grid", 0), "^keep: expected 4 integers, got 2"),
        ((CU, SPANS, [1, 2, 1, 2], "grid", 2), r"^spans: .*\[N, 5\]"),
        ((CU, SPANS, [1, 2], "random", 0), "^pattern: .*random"),
        ((CU, GRID, [1, 2, 1, 2], "grid", -1), "^max_height: "),
    ]:
        with pytest.raises(BY_THE_OP, match=message):
            op(*arguments)
