"""rebuild_metadata in Triton against the reference."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rebuild_metadata import PATTERNS, fractions, int32, layouts, same
from torch import Tensor

from adsc_kernels import ops
from adsc_kernels.backend import backend


def both(*arguments: object) -> tuple[ops.Metadata, ops.Metadata]:
    with backend("triton"):
        found = ops.rebuild_metadata(*arguments)
    with backend("reference"):
        return found, ops.rebuild_metadata(*arguments)


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), keep=fractions, pattern=st.sampled_from(PATTERNS), five=st.booleans())
def test_equals_reference(
    layout: tuple[Tensor, Tensor], keep: Fraction, pattern: str, five: bool
) -> None:
    cu_seqlens, spans = layout
    spans = spans if five else spans[:, :3].contiguous()
    assert same(*both(cu_seqlens, spans, keep, pattern))


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), rows=fractions, cols=fractions, spare=st.integers(0, 3))
def test_grid_equals_reference(
    layout: tuple[Tensor, Tensor], rows: Fraction, cols: Fraction, spare: int
) -> None:
    cu_seqlens, spans = layout
    height = int(spans[:, 3].max()) + spare if len(spans) else spare
    assert same(*both(cu_seqlens, spans, (rows, cols), "grid", height))


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
    if grid:
        assert same(*both(*arguments, ("1/2", "1/3"), "grid", 4))
    else:
        assert same(*both(*arguments, "1/3", "center"))


def test_the_longest_spans() -> None:
    """Products of the keep rule past 2^32."""
    top = (1 << 31) - 1
    arguments = int32([0, top], 2), int32([0, 0, top], 1, 3), Fraction(top - 2, top - 1)
    found = both(*arguments, "linspace")[0]
    assert found.segments.tolist()[1] == [0, 0, top, top - 1, 0, 2]


def test_no_sequences() -> None:
    assert same(*both(torch.zeros(1, dtype=torch.int32), int32([], 0, 3), "1/2"))
