"""The CUDA boundary_step, run on a CPU: all in one launch, against the reference."""

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


def test_more_spans_than_a_block_has_threads() -> None:
    """Empty sequences, adjacent spans, and text whose place hangs on what is dropped before it."""
    generator = torch.Generator().manual_seed(0)
    bounds, spans = [0], []
    for sequence in range(300):
        position = int(torch.randint(0, 3, (), generator=generator))
        for _ in range(int(torch.randint(0, 4, (), generator=generator))):
            length = int(torch.randint(0, 9, (), generator=generator))
            spans.append([sequence, position, length])
            position += length + int(torch.randint(0, 2, (), generator=generator))
        bounds.append(bounds[-1] + position)
    assert len(spans) > 256
    given = int32(bounds, -1), int32(spans, -1, 3), "1/3", "linspace"
    total = int(reference(ops.rebuild_metadata, *given).num_tokens)
    arguments = {
        **drawn(bounds[-1], 64, torch.bfloat16),
        "others": [torch.arange(bounds[-1])],
        "layout": ops.BatchLayout(*given, num_tokens=total + 5),
    }
    for enough in (1, 132 * 1024):
        check(Rows(arguments, norm=True), emulating((4, 0, enough)))
