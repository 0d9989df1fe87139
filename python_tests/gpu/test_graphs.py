"""CUDA graphs: captured once, replayed over other rows, other tables and other layouts."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from cases.segment_tables import stage_of
from gpu_device import DEVICE, capture, on_device, to_device

from adsc_kernels import CompressionSchedule, make_plan, ops

HIDDEN = 256
# Two tables of one shape: what survives differs.
TABLES = (
    [[0, 0, 30, 30, 0, 0], [30, 30, 60, 20, 0, 0], [50, 90, 10, 10, 0, 0]],
    [[0, 5, 80, 40, 0, 2], [40, 85, 5, 5, 0, 0], [45, 85, 15, 15, 0, 1]],
)


def test_other_rows_and_another_table() -> None:
    first, second = (to_device(stage_of(table, 60, 100)) for table in TABLES)
    x = torch.randn(100, HIDDEN, device=DEVICE)
    positions = torch.arange(100, device=DEVICE)
    weight = torch.rand(HIDDEN, device=DEVICE)
    residual = torch.randn(100, HIDDEN, device=DEVICE)

    def step() -> list[object]:
        return [
            ops.downsample(x, first),
            ops.downsample_many([x, positions], first),
            ops.downsample_add_rms_norm(x, residual, weight, first),
        ]

    replay, outputs = capture(step)
    for table in (first.segments.clone(), second.segments, first.segments.clone()):
        x.normal_()
        residual.normal_()
        positions.random_(1 << 40)
        first.segments.copy_(table)
        replay()
        moved, hidden, where, normed, summed = (out.clone() for out in outputs)
        wanted = ops.downsample_add_rms_norm(x, residual, weight, first)
        assert torch.equal(moved, ops.downsample(x, first))
        assert torch.equal(hidden, moved)
        assert torch.equal(where, ops.downsample(positions, first))
        assert torch.equal(normed, wanted[0]) and torch.equal(summed, wanted[1])


@pytest.mark.parametrize("width", [torch.int32, torch.int64])
def test_other_indices(width: torch.dtype) -> None:
    x = torch.randn(100, HIDDEN, device=DEVICE)
    rows = torch.arange(40, device=DEVICE, dtype=width)
    replay, (out,) = capture(lambda: ops.downsample(x, keep_indices=rows))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        rows.copy_(torch.randint(0, 100, (40,), generator=generator))
        x.normal_()
        replay()
        assert torch.equal(out, x[rows.long()])


LAYOUTS = [  # (text before, picture, text after) of each sequence; all in one shape of tensors
    [(10, 40, 20), (5, 64, 0), (0, 16, 30)],
    [(0, 64, 9), (30, 8, 1), (2, 33, 7)],
    [(1, 1, 1), (0, 0, 5), (3, 50, 3)],
]
CAPACITY = 256


def layout_of(parts: list[tuple[int, int, int]]) -> tuple[list[int], list[tuple[int, int, int]]]:
    bounds = [0, *accumulate(map(sum, parts))]
    return bounds, [(b, before, length) for b, (before, length, _) in enumerate(parts)]


def test_another_layout_through_two_boundaries() -> None:
    """rebuild_metadata twice: the second takes what the first made, on the device all along."""
    bounds, spans = (on_device(part) for part in layout_of(LAYOUTS[0]))

    def step() -> list[object]:
        one = ops.rebuild_metadata(bounds, spans, "1/4", "center")
        return [one, ops.rebuild_metadata(one.cu_seqlens, one.spans, "1/2", "center")]

    replay, outputs = capture(step)
    schedule = CompressionSchedule.parse("1:1/4,2:1/2@center", num_layers=3)
    for parts in LAYOUTS[1:] + LAYOUTS[:1]:
        new_bounds, new_spans = layout_of(parts)
        bounds.copy_(torch.tensor(new_bounds))
        spans.copy_(torch.tensor(new_spans))
        replay()
        plan = make_plan(schedule, new_bounds, new_spans)
        for stage, got in zip(plan.stages[1:], (outputs[:6], outputs[6:]), strict=True):
            made = ops.Metadata(*(t.cpu() for t in got))
            assert torch.equal(made.cu_seqlens, stage.cu_seqlens)
            assert tuple(made.seq_lens.tolist()) == stage.seq_lens
            assert (int(made.num_tokens), int(made.max_seqlen)) == (
                stage.num_tokens,
                stage.max_seqlen,
            )


@pytest.mark.parametrize("norm", [False, True], ids=["moved", "normed"])
def test_boundary_step_over_another_layout(norm: bool) -> None:
    """The layout and the rows change under the graph; rows past the stage's total are zeros."""
    bounds, spans = (on_device(part) for part in layout_of(LAYOUTS[0]))
    hidden, residual = torch.randn(2, CAPACITY, HIDDEN, device=DEVICE).unbind()
    weight = torch.rand(HIDDEN, device=DEVICE)
    positions = torch.arange(CAPACITY, device=DEVICE)
    layout = ops.BatchLayout(bounds, spans, "1/4", num_tokens=CAPACITY)
    options = {"residual": residual, "weight": weight} if norm else {}
    replay, outputs = capture(
        lambda: ops.boundary_step(hidden, layout=layout, others=[positions], **options)
    )
    schedule = CompressionSchedule.parse("1:1/4", num_layers=2)
    for parts in LAYOUTS[1:] + LAYOUTS[:1]:
        new_bounds, new_spans = layout_of(parts)
        bounds.copy_(torch.tensor(new_bounds))
        spans.copy_(torch.tensor(new_spans))
        hidden.normal_()
        residual.normal_()
        positions.random_(1, 1 << 40)
        replay()
        stage = make_plan(schedule, new_bounds, new_spans, device=DEVICE).stages[1]
        kept = stage.keep_indices()
        total = stage.num_tokens
        got = [out.clone() for out in outputs]
        wanted = [hidden[kept]]
        if norm:
            wanted = list(ops.downsample_add_rms_norm(hidden, residual, weight, keep_indices=kept))
        wanted.append(positions[kept])
        for i, (mine, truth) in enumerate(zip(got, wanted, strict=False)):
            if norm and i == 0:
                torch.testing.assert_close(mine[:total], truth)
            else:
                assert torch.equal(mine[:total], truth)
            assert not mine[total:].any()
        metadata = ops.Metadata(*got[len(wanted) :])
        assert torch.equal(metadata.cu_seqlens, stage.cu_seqlens)
        assert int(metadata.num_tokens) == total
