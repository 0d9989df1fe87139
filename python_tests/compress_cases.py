"""Boundaries drawn by hypothesis, to go with the caches of cache_cases; and what a step must do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from cache_cases import Built, Case
from hypothesis import strategies as st
from row_bits import STRIDES, random_bits, same_bits, strided_rows
from segment_tables import stages
from test_rebuild_metadata import PATTERNS, fractions, layouts

from adsc_kernels import backend, ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OTHERS = st.lists(
    st.tuples(
        st.sampled_from([torch.int64, torch.float32, torch.bool, torch.bfloat16]),
        st.sampled_from([(), (3,), (64,), (2, 8)]),
        st.sampled_from(STRIDES),
    ),
    max_size=3,
)


@dataclass(frozen=True)
class Rows:
    """The arguments of a boundary_step, and whether it norms."""

    arguments: dict[str, Any]
    norm: bool


@st.composite
def boundaries(draw: st.DrawFn, max_length: int = 40) -> Rows:
    form = draw(st.sampled_from(["stage", "keep_indices", "layout"]))
    arguments: dict[str, Any] = {}
    if form == "layout":
        cu_seqlens, spans = draw(layouts())
        pattern = draw(st.sampled_from([*PATTERNS, "grid"]))
        grid = pattern == "grid"
        keep = (draw(fractions), draw(fractions)) if grid else draw(fractions)
        given = (cu_seqlens, spans, keep, pattern, 6 if grid else None)
        with backend("reference"):  # the one in force may be a device's
            total = int(ops.rebuild_metadata(*given).num_tokens)
        arguments["layout"] = ops.Layout(*given, num_tokens=total + draw(st.integers(0, 5)))
        rows = int(cu_seqlens[-1]) + draw(st.integers(0, 3))
    else:
        stage = draw(stages(max_length=max_length))
        rows = stage.num_tokens_in
        arguments["stage"] = stage
        if form == "keep_indices":
            arguments = {"keep_indices": torch.tensor(reference.source_rows(stage)).long()}
    width, dtype = draw(st.sampled_from([1, 7, 8, 64, 520])), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(rows)
    norm = draw(st.booleans())
    arguments["hidden"] = torch.randn(rows, width, generator=generator).to(dtype)
    if norm:
        arguments["residual"] = torch.randn(rows, width, generator=generator).to(dtype)
        arguments["weight"] = torch.randn(width, generator=generator).to(dtype) + 1
    arguments["others"] = [
        strided_rows(random_bits(rows, trailing, kind, i), stride)
        for i, (kind, trailing, stride) in enumerate(draw(OTHERS))
    ]
    return Rows(arguments, norm)


def cache_of(case: Case, arguments: dict[str, Any]) -> ops.DenseCache | ops.PagedCache:
    paged = "block_table" in case.extra
    return ops.PagedCache(**arguments) if paged else ops.DenseCache(**arguments)


def run(
    case: Case, built: Built, rows: Rows, arguments: dict[str, Any] | None = None
) -> ops.CompressStep:
    """arguments: those of the cache; None: as they were built."""
    cache = cache_of(case, built.arguments if arguments is None else arguments)
    return ops.compress_step(cache=cache, **rows.arguments)


def same_boundary(got: ops.BoundaryStep, wanted: ops.BoundaryStep, exact: bool) -> None:
    """exact: the norm too, as of one backend."""
    if exact:
        assert same_bits(got.hidden, wanted.hidden)
    else:
        torch.testing.assert_close(got.hidden, wanted.hidden)
    pairs = [(got.residual, wanted.residual), *zip(got.others, wanted.others, strict=True)]
    pairs += zip(got.metadata or (), wanted.metadata or (), strict=True)
    for mine, theirs in pairs:
        assert (mine is None) == (theirs is None)
        assert mine is None or (same_bits(mine, theirs) and mine.is_contiguous())
