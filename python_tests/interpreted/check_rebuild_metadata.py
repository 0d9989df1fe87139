"""rebuild_metadata in Triton against the reference."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from cases.rebuild_metadata import calls, check, grid_calls, int32
from cases.run import on
from hypothesis import given, settings

TRITON = on("triton")


@settings(max_examples=30, deadline=None)
@given(calls())
def test_equals_reference(call: tuple[Any, ...]) -> None:
    check(call, TRITON)


@settings(max_examples=30, deadline=None)
@given(grid_calls())
def test_grid_equals_reference(call: tuple[Any, ...]) -> None:
    check(call, TRITON)


@pytest.mark.parametrize("grid", [False, True], ids=["span", "grid"])
@pytest.mark.parametrize("batch", [128, 129, 2100])
def test_large_batches(batch: int, grid: bool) -> None:
    """More sequences and spans than a program has lanes; some sequences with none or two spans."""
    bounds, spans = [0], []
    for b in range(batch):
        position = b % 3
        for k in range((b * 7 + 1) % 3):
            height, width = 1 + (b + k) % 4, 2 + b % 5
            spans.append([b, position, height * width, height, width])
            position += height * width + k
        bounds.append(bounds[-1] + position + b % 2)
    arguments = (int32(bounds, -1), int32(spans, -1, 5))
    rest = (("1/2", "1/3"), "grid", 4) if grid else ("1/3", "center")
    check((*arguments, *rest), TRITON)


def test_the_longest_spans() -> None:
    """Products of the keep rule past 2^32."""
    top = (1 << 31) - 1
    keep = Fraction(top - 2, top - 1)
    found = check((int32([0, top], 2), int32([0, 0, top], 1, 3), keep, "linspace"), TRITON)
    assert found.segments.tolist()[1] == [0, 0, top, top - 1, 0, 2]


def test_no_sequences() -> None:
    check((torch.zeros(1, dtype=torch.int32), int32([], 0, 3), "1/2"), TRITON)
