"""The CUDA rebuild_metadata, run on a CPU, against the reference."""

from typing import Any

import pytest
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


def ragged(sequences: int, most_spans: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of up to so many spans of up to 2 x 4, some empty, one after another or not."""
    generator = torch.Generator().manual_seed(seed)

    def draw(end: int) -> int:
        return int(torch.randint(0, end, (), generator=generator))

    bounds, spans = [0], []
    for sequence in range(sequences):
        position = draw(4)
        for _ in range(draw(most_spans + 1)):
            height, width = draw(3), draw(5)
            spans.append([sequence, position, height * width, height, width])
            position += height * width + draw(2)
        bounds.append(bounds[-1] + position)
    return int32(bounds, -1), int32(spans, -1, 5)


@pytest.mark.parametrize("sequences", [128, 129, 1100])
def test_one_block_and_more(sequences: int) -> None:
    """A block is for 128 sequences, and counts what lies before them by itself."""
    cu_seqlens, spans = ragged(sequences, 3, sequences)
    check((cu_seqlens, spans, ("1/2", "1/3"), "grid", 3), emulating((3, 0, 1)))
    check((cu_seqlens, spans[:, :3].contiguous(), "1/3", "center"), emulating((4, 3, 1)))


def test_more_sequences_than_there_are_blocks_of_128() -> None:
    cu_seqlens, spans = ragged(128 * 128 + 70, 0, 0)
    last = len(cu_seqlens) - 2
    spans = int32([[0, 0, 0], [9, 0, 1], [last, 0, 0]], 3, 3)
    cu_seqlens[10:] += 1
    check((cu_seqlens, spans, "0", "start"), emulating((5, 1, 1)))
