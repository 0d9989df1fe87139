"""The CUDA rebuild_metadata, run on a CPU, against the reference."""

from typing import Any

import torch
from cases.rebuild_metadata import calls, check, grid_calls, int32
from hypothesis import given, settings
from simt import Schedule, emulating, needs_simt, schedules

pytestmark = needs_simt


@settings(max_examples=60, deadline=None)
@given(calls(), schedules)
def test_equals_reference(call: tuple[Any, ...], schedule: Schedule) -> None:
    check(call, emulating(schedule))


@settings(max_examples=60, deadline=None)
@given(grid_calls(), schedules)
def test_grid_equals_reference(call: tuple[Any, ...], schedule: Schedule) -> None:
    check(call, emulating(schedule))


def test_thousands_of_sequences() -> None:
    """More than a block has threads, some without spans, some with two, one after another."""
    generator = torch.Generator().manual_seed(0)
    bounds, spans = [0], []
    for sequence in range(1100):
        position = int(torch.randint(0, 4, (), generator=generator))
        for _ in range(int(torch.randint(0, 4, (), generator=generator))):
            length = int(torch.randint(0, 9, (), generator=generator))
            spans.append([sequence, position, length])
            position += length + 1
        bounds.append(bounds[-1] + position)
    call = int32(bounds, -1), int32(spans, -1, 3), "1/3", "center"
    check(call, emulating((3, 0, 1)))
