"""The CUDA boundary_step, run on a CPU: all in one launch, against the reference."""

import pytest
import torch
from cases.boundary_step import Rows, boundaries, check, drawn
from cases.rebuild_metadata import int32
from cases.run import reference
from hypothesis import given, settings
from simt import Schedule, emulating, needs_simt, schedules

from adsc_kernels import ops

pytestmark = needs_simt


@settings(max_examples=40, deadline=None)
@given(boundaries(max_length=12, forms=("stage",)), schedules)
def test_of_a_stage(rows: Rows, schedule: Schedule) -> None:
    check(rows, emulating(schedule))


@settings(max_examples=40, deadline=None)
@given(boundaries(max_length=12, forms=("keep_indices",)), schedules)
def test_of_indices(rows: Rows, schedule: Schedule) -> None:
    check(rows, emulating(schedule))


@settings(max_examples=60, deadline=None)
@given(boundaries(forms=("layout",)), schedules)
def test_of_a_layout(rows: Rows, schedule: Schedule) -> None:
    check(rows, emulating(schedule))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sequences", [128, 129])
def test_a_layout_longer_than_a_block_scans(sequences: int, dtype: torch.dtype) -> None:
    """Then, and for a norm of doubles, the metadata comes first, and rows are found in its table.

    Adjacent spans, text whose place hangs on what is dropped before it, and more tensors than a
    launch takes.
    """
    generator = torch.Generator().manual_seed(0)
    bounds, spans = [0], []
    for sequence in range(sequences):
        position = int(torch.randint(0, 3, (), generator=generator))
        length = int(torch.randint(0, 9, (), generator=generator))
        spans.append([sequence, position, length])
        bounds.append(bounds[-1] + position + length + sequence % 2)
    given = int32(bounds, -1), int32(spans, -1, 3), "1/3", "linspace"
    total = int(reference(ops.rebuild_metadata, *given).num_tokens)
    arguments = {
        **drawn(bounds[-1], 64, dtype),
        "others": [torch.arange(bounds[-1]) + i for i in range(18)],
        "layout": ops.BatchLayout(*given, num_tokens=total + 5),
    }
    check(Rows(arguments, norm=True), emulating((4, 0, 2000)))
