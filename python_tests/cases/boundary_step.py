"""Boundaries drawn by hypothesis, and what a boundary_step must do with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels import ops
from cases.rebuild_metadata import PATTERNS, fractions, layouts
from cases.row_bits import STRIDES, random_bits, same_bits, shifted, strided_rows
from cases.run import Run, reference
from cases.segment_tables import source_rows, stages

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMS = ("stage", "keep_indices", "layout")
WIDTHS = [0, 1, 7, 8, 64, 520, 1032]
Kind = tuple[torch.dtype, tuple[int, ...], str]
TRAILING = [(), (3,), (64,), (2, 8), (0,)]


def others_of(
    trailing: list[tuple[int, ...]] = TRAILING, max_size: int = 4
) -> st.SearchStrategy[list[Kind]]:
    dtypes = [torch.int64, torch.float32, torch.bool, torch.bfloat16]
    kinds = st.tuples(*map(st.sampled_from, (dtypes, trailing, STRIDES)))
    return st.lists(kinds, max_size=max_size)


@dataclass(frozen=True)
class Rows:
    """The arguments of a boundary_step, and whether it norms."""

    arguments: dict[str, Any]
    norm: bool


def drawn(rows: int, hidden: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + hidden)
    values = [torch.randn(rows, hidden, generator=generator) for _ in range(2)]
    values.append(torch.randn(hidden, generator=generator) + 1)
    names = ("hidden", "residual", "weight")
    return {name: value.to(dtype) for name, value in zip(names, values, strict=True)}


def moved(rows: int, kinds: list[Kind]) -> list[Tensor]:
    return [
        strided_rows(random_bits(rows, trailing, dtype, i), stride)
        for i, (dtype, trailing, stride) in enumerate(kinds)
    ]


@st.composite
def batch_layouts(draw: st.DrawFn) -> ops.BatchLayout:
    """num_tokens has room for some more rows than the stage has."""
    cu_seqlens, spans = draw(layouts())
    pattern = draw(st.sampled_from([*PATTERNS, "grid"]))
    grid = pattern == "grid"
    keep = (draw(fractions), draw(fractions)) if grid else draw(fractions)
    given = (cu_seqlens, spans, keep, pattern, 6 if grid else None)
    total = int(reference(ops.rebuild_metadata, *given).num_tokens)
    return ops.BatchLayout(*given, num_tokens=total + draw(st.sampled_from([0, 0, 1, 5, 40])))


@st.composite
def boundaries(
    draw: st.DrawFn,
    max_length: int = 40,
    forms: tuple[str, ...] = FORMS,
    widths: list[int] = WIDTHS,
    kinds: st.SearchStrategy[list[Kind]] | None = None,
) -> Rows:
    """widths: of hidden. kinds: of the others."""
    form = draw(st.sampled_from(forms))
    arguments: dict[str, Any] = {}
    behind = 0  # rows that no sequence has
    if form == "layout":
        arguments["layout"] = layout = draw(batch_layouts())
        behind = draw(st.integers(0, 4))
        rows = int(layout.cu_seqlens[-1]) + behind
    else:
        stage = draw(stages(max_length=max_length))
        rows = stage.num_tokens_in
        arguments["stage"] = stage
        if form == "keep_indices":
            width = draw(st.sampled_from([torch.int32, torch.int64]))
            arguments = {"keep_indices": torch.tensor(source_rows(stage), dtype=width)}
    inputs = drawn(rows, draw(st.sampled_from(widths)), draw(st.sampled_from(DTYPES)))
    norm = draw(st.booleans())
    arguments.update(inputs if norm else {"hidden": inputs["hidden"]})
    arguments["eps"] = draw(st.sampled_from([1e-6, 1e-5]))
    arguments["hidden"][rows - behind :] = torch.nan
    arguments["hidden"] = shifted(arguments["hidden"], draw(st.sampled_from([0, 0, 1])))
    arguments["others"] = moved(rows, draw(kinds or others_of()))
    return Rows(arguments, norm)


def same_step(
    got: ops.BoundaryStep,
    wanted: ops.BoundaryStep,
    close: Callable[[Tensor, Tensor], None] | None = torch.testing.assert_close,
) -> None:
    """close: how near the norms are to be; None: the same bits."""
    if close is None or wanted.residual is None:
        assert same_bits(got.hidden, wanted.hidden)
    else:
        close(got.hidden, wanted.hidden)
    pairs = [(got.residual, wanted.residual), *zip(got.others, wanted.others, strict=True)]
    pairs += zip(got.metadata or (), wanted.metadata or (), strict=True)
    for mine, theirs in pairs:
        assert (mine is None) == (theirs is None)
        assert mine is None or (same_bits(mine, theirs) and mine.is_contiguous())


def check(
    rows: Rows,
    run: Run,
    close: Callable[[Tensor, Tensor], None] = torch.testing.assert_close,
) -> ops.BoundaryStep:
    got = run(ops.boundary_step, **rows.arguments)
    same_step(got, reference(ops.boundary_step, **rows.arguments), close)
    if got.metadata is not None:
        total = int(got.metadata.num_tokens)
        for x in (got.hidden, got.residual, *got.others):
            assert x is None or not x[total:].any()  # the norm of a zero may be -0
    return got
