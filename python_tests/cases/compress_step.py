"""compress_step: what it must do with drawn boundaries and the drawn caches of cases.compact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels import CompressionSchedule, make_plan, ops
from cases.boundary_step import Rows, same_step
from cases.compact import (
    Built,
    Case,
    check_buffers,
    check_results,
    dense_cases,
    on_device,
    paged_cases,
)
from cases.run import Run, reference

caches = st.one_of(dense_cases(), paged_cases())


def cache_of(case: Case, arguments: dict[str, Any]) -> ops.DenseCache | ops.PagedCache:
    paged = "block_table" in case.extra
    return ops.PagedCache(**arguments) if paged else ops.DenseCache(**arguments)


def step(case: Case, built: Built, rows: Rows, run: Run, uploaded: bool) -> ops.CompressStep:
    """uploaded: lists of ints are Ints."""
    arguments = on_device(built.arguments) if uploaded else built.arguments
    return run(ops.compress_step, cache=cache_of(case, arguments), **rows.arguments)


def check(
    case: Case,
    rows: Rows,
    run: Run,
    *,
    uploaded: bool = True,
    close: Callable[[Tensor, Tensor], None] = torch.testing.assert_close,
) -> None:
    built, wanted = case.build(), case.build()
    got = step(case, built, rows, run, uploaded)
    truth = step(case, wanted, rows, reference, False)
    check_results(got.compaction, truth.compaction)
    check_buffers(built, wanted)
    same_step(got.boundary, truth.boundary, close)


# ---- Arguments of the op itself ----

SCHEDULE = CompressionSchedule.parse("1:1/2,2:1/4@center", num_layers=4)
PLAN = make_plan(SCHEDULE, [0, 14, 22], [(0, 5, 6), (1, 2, 5)])
S = PLAN.stages[1]
OWN = (S.segments, None, S.cu_seqlens, S.cu_seqlens_in, None, None)
TABLE = torch.randperm(30)[:20].reshape(2, 10)
HIDDEN = torch.randn(S.num_tokens_in, 8)
WEIGHT = torch.randn(8)


def sample(kind: str) -> tuple[Any, ...]:
    boundary = (HIDDEN, None, None, 1e-6, [torch.arange(S.num_tokens_in)], S.segments, None)
    boundary += (None, None, [], "start", 0, S.num_tokens)
    outs = [HIDDEN.new_empty(S.num_tokens, 8), torch.empty(S.num_tokens, dtype=torch.int64)]
    if kind == "layout":
        cu, spans = S.cu_seqlens_in, torch.tensor([[0, 5, 6], [1, 2, 5]], dtype=torch.int32)
        boundary = (HIDDEN, HIDDEN + 1, WEIGHT, 1e-6, [], None, None, cu, spans)
        boundary += ([1, 2], "start", 0, S.num_tokens)
        metadata = ops.rebuild_metadata(cu, spans, "1/2")
        outs = [outs[0], outs[0].clone(), *(torch.empty_like(x) for x in metadata)]
    if kind == "paged":
        pools = [torch.randn(30, 4, 2, 3) for _ in range(2)]
        return (*boundary, pools, 1, TABLE, 4, *OWN, None, True, torch.tensor([99]), "NHD", outs)
    cache = torch.randn(S.num_tokens_in, 2, 3)
    return (*boundary, [cache], 1, None, 0, *OWN, S.cu_seqlens_in, False, None, "NHD", outs)
