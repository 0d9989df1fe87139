"""Layouts of batches drawn by hypothesis, and what rebuild_metadata makes of them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels import ops
from cases.run import Run, reference

PATTERNS = ("start", "center", "linspace")
fractions = st.fractions(0, 1, max_denominator=9)


def int32(values: object, *shape: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).reshape(shape)


@st.composite
def layouts(draw: st.DrawFn, smallest: int = 0) -> tuple[Tensor, Tensor]:
    """Ragged batches of [N, 5] spans: none, adjacent, at either end, empty; with text or not."""
    bounds, spans = [0], []
    for sequence in range(draw(st.integers(0, 4))):
        position = draw(st.integers(0, 3))
        for _ in range(draw(st.integers(0, 3))):
            height, width = draw(st.integers(smallest, 6)), draw(st.integers(smallest, 7))
            spans.append([sequence, position, height * width, height, width])
            position += height * width + draw(st.integers(0, 3))
        bounds.append(bounds[-1] + position)
    return int32(bounds, -1), int32(spans, -1, 5)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Any, ...]:
    """The arguments of rebuild_metadata, by a pattern of the span."""
    cu_seqlens, spans = draw(layouts())
    if draw(st.booleans()):
        spans = spans[:, :3].contiguous()
    return cu_seqlens, spans, draw(fractions), draw(st.sampled_from(PATTERNS))


@st.composite
def grid_calls(draw: st.DrawFn) -> tuple[Any, ...]:
    cu_seqlens, spans = draw(layouts())
    height = int(spans[:, 3].max()) if len(spans) else 0
    keep = (draw(fractions), draw(fractions))
    return cu_seqlens, spans, keep, "grid", height + draw(st.integers(0, 3))


def same(a: ops.Metadata, b: ops.Metadata) -> bool:
    return all(
        x.dtype == y.dtype == torch.int32 and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


def check(call: tuple[Any, ...], run: Run) -> ops.Metadata:
    got = run(ops.rebuild_metadata, *call)
    assert same(got, reference(ops.rebuild_metadata, *call))
    return got
