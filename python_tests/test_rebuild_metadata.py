"""rebuild_metadata against the reference and, chained over boundaries, against the planner."""
# ruff: noqa: E501 (tables of cases, one a line)

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_tables import by_stage
from torch import Tensor

from adsc_kernels import CompressionSchedule, make_plan, ops, reference
from adsc_kernels.backend import backend

PATTERNS = ("start", "center", "linspace")


def int32(values: object, *shape: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).reshape(shape)


@st.composite
def layouts(draw: st.DrawFn, smallest: int = 0) -> tuple[Tensor, Tensor]:
    """Ragged batches of [N, 5] spans: none, adjacent, at either end, empty, with or without text."""
    bounds, spans = [0], []
    for sequence in range(draw(st.integers(0, 4))):
        position = draw(st.integers(0, 3))
        for _ in range(draw(st.integers(0, 3))):
            height, width = draw(st.integers(smallest, 6)), draw(st.integers(smallest, 7))
            spans.append([sequence, position, height * width, height, width])
            position += height * width + draw(st.integers(0, 3))
        bounds.append(bounds[-1] + position)
    return int32(bounds, -1), int32(spans, -1, 5)


fractions = st.fractions(0, 1, max_denominator=9)


def same(a: ops.Metadata, b: ops.Metadata) -> bool:
    return all(
        x.dtype == y.dtype == torch.int32 and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


@settings(max_examples=200, deadline=None)
@given(layout=layouts(), keep=fractions, pattern=st.sampled_from(PATTERNS), five=st.booleans())
def test_equals_reference(
    layout: tuple[Tensor, Tensor], keep: Fraction, pattern: str, five: bool
) -> None:
    cu_seqlens, spans = layout
    spans = spans if five else spans[:, :3].contiguous()
    out = ops.rebuild_metadata(cu_seqlens, spans, keep, pattern)
    with backend("reference"):
        assert same(out, ops.rebuild_metadata(cu_seqlens, spans, keep, pattern))
    batch, count = len(cu_seqlens) - 1, len(spans)
    assert out.segments.shape == (batch + 2 * count, 6)
    assert out.spans.shape == (count, 3)
    check_movement(out, int(cu_seqlens[-1]))


@settings(max_examples=200, deadline=None)
@given(layout=layouts(), rows=fractions, cols=fractions, spare=st.integers(0, 3))
def test_grid_equals_reference(
    layout: tuple[Tensor, Tensor], rows: Fraction, cols: Fraction, spare: int
) -> None:
    cu_seqlens, spans = layout
    height = int(spans[:, 3].max()) + spare if len(spans) else spare
    out = ops.rebuild_metadata(cu_seqlens, spans, (rows, cols), "grid", height)
    with backend("reference"):
        assert same(out, ops.rebuild_metadata(cu_seqlens, spans, (rows, cols), "grid", height))
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


CU = int32([0, 10, 16], 3)
SPANS = int32([[0, 1, 4], [0, 5, 3], [1, 0, 6]], 3, 3)
GRID = int32([[0, 1, 4, 2, 2], [1, 0, 6, 2, 3]], 2, 5)


def bad_spans(*rows: list[int]) -> tuple[object, ...]:
    return (CU, int32(rows, len(rows), len(rows[0])), "1/2")


BAD_CALLS = {
    "cu_seqlens list": (([0, 10], SPANS, 1), TypeError, "^cu_seqlens: .*list"),
    "cu_seqlens int64": ((CU.long(), SPANS, 1), TypeError, "^cu_seqlens: .*int32, got torch.int64"),
    "cu_seqlens shape": ((CU[None], SPANS, 1), ValueError, r"^cu_seqlens: .*\(1, 3\)"),
    "cu_seqlens empty": ((CU[:0], SPANS, 1), ValueError, r"^cu_seqlens: .*\(0,\)"),
    "cu_seqlens strides": ((CU[::2], SPANS, 1), ValueError, "^cu_seqlens: .*contiguous"),
    "cu_seqlens first": ((CU + 1, SPANS, 1), ValueError, "^cu_seqlens: expected 0 first, got 1"),
    "cu_seqlens falls": ((int32([0, 10, 9], 3), SPANS[:2], 1), ValueError, "^cu_seqlens: .*got 9 after 10"),
    "spans dtype": ((CU, SPANS.float(), 1), TypeError, "^spans: .*float32"),
    "spans shape": ((CU, SPANS[:, :2].clone(), 1), ValueError, r"^spans: .*\(3, 2\)"),
    "spans strides": ((CU, GRID[:, :3], 1), ValueError, "^spans: .*contiguous"),
    "spans device": ((CU, SPANS.to("meta"), 1), ValueError, "^spans: .*device.*cpu, got meta"),
    "spans sequence": (bad_spans([2, 0, 1]), ValueError, r"^spans: row 0 \(sequence 2, .*\[0, 2\)"),
    "spans negative sequence": (bad_spans([-1, 0, 1]), ValueError, r"^spans: row 0 .*\[0, 2\)"),
    "spans order": (bad_spans([1, 0, 1], [0, 0, 1]), ValueError, "^spans: row 1 .*in order"),
    "spans overlap": (bad_spans([0, 0, 5], [0, 4, 2]), ValueError, "^spans: row 1 .*at least 5"),
    "spans start": (bad_spans([0, -1, 2]), ValueError, "^spans: row 0 .*at least 0"),
    "spans length": (bad_spans([0, 3, -1]), ValueError, "^spans: row 0 .*length"),
    "spans leave": (bad_spans([1, 3, 4]), ValueError, "^spans: row 0 .*sequence's 6"),
    "spans size": (bad_spans([0, 0, 4, 2, 3]), ValueError, "^spans: row 0 .*2 x 3"),
    "spans height": ((CU, GRID, (1, 1), "grid", 1), ValueError, "^spans: row 0 .*max_height, got 2"),
    "spans of three for the grid": ((CU, SPANS, (1, 1), "grid", 2), ValueError, r"^spans: .*\[N, 5\]"),
    "keep above": ((CU, SPANS, "3/2"), ValueError, r"^keep: .*\[0, 1\], got '3/2'"),
    "keep below": ((CU, SPANS, (-1, 2)), ValueError, "^keep: "),
    "keep float": ((CU, SPANS, 0.3), TypeError, "^keep: .*got 0.3"),
    "keep words": ((CU, SPANS, "half"), ValueError, "^keep: .*'half'"),
    "keep over zero": ((CU, SPANS, (1, 0)), ValueError, r"^keep: .*\(1, 0\)"),
    "keep none": ((CU, SPANS, None), TypeError, "^keep: .*None"),
    "keep too fine": ((CU, SPANS, (1, 1 << 31)), ValueError, "^keep: "),
    "keep single for the grid": ((CU, GRID, "1/2", "grid", 2), TypeError, "^keep: .*pair"),
    "pattern": ((CU, SPANS, 1, "random"), ValueError, "^pattern: .*start, center, linspace, grid, got 'random'"),
    "max_height missing": ((CU, GRID, (1, 1), "grid"), ValueError, "^max_height: .*None"),
    "max_height negative": ((CU, GRID, (1, 1), "grid", -1), ValueError, "^max_height: .*-1"),
    "max_height unasked": ((CU, SPANS, 1, "start", 2), ValueError, "^max_height: expected None"),
}  # fmt: skip


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
        with pytest.raises(ValueError, match=message):
            op(*arguments)
