"""The CUDA compress_step, run on a CPU: one launch does what its two ops do, in any order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cases.boundary_step import Rows, boundaries, same_step
from cases.compact import Case, dense_cases, paged_cases
from cases.compress_step import check
from cases.plans import image_plan
from hypothesis import given, settings
from simt import POISON, Schedule, emulating_in_place, guards_intact, needs_simt, schedules
from torch import Tensor

from adsc_kernels import backend, fakes, ops
from adsc_kernels.kv.pages import Ints
from adsc_kernels.ops.boundary_step import check_boundary

pytestmark = needs_simt
NAMES = ("hidden", "stage", "residual", "weight", "eps", "others", "keep_indices", "layout")
GUARD = 64  # bytes


def guarded(like: Tensor) -> Tensor:
    """Of the shape and dtype of like, poisoned, in a buffer with more poison on either side."""
    data = torch.full((like.nbytes + 2 * GUARD,), POISON, dtype=torch.uint8)
    inside = data[GUARD : GUARD + like.nbytes].view(like.dtype)
    return inside.as_strided(like.shape, like.stride(), inside.storage_offset())


@contextmanager
def outputs_of(rows: Rows) -> Iterator[list[Tensor]]:
    """What the op is to write, in place of what Python would allocate."""
    given = {"eps": 1e-6, "others": [], **rows.arguments}
    outs = list(map(guarded, fakes.boundary_step(*check_boundary(*map(given.get, NAMES)))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fakes, "boundary_step", lambda *_: outs)
        yield outs
    assert all(map(guards_intact, outs))


def check_emulated(case: Case, rows: Rows, schedule: Schedule) -> None:
    with outputs_of(rows) as outs:
        check(case, rows, emulating_in_place(schedule, *outs))


@settings(max_examples=50, deadline=None)
@given(case=dense_cases(), rows=boundaries(max_length=12), schedule=schedules)
def test_dense(case: Case, rows: Rows, schedule: Schedule) -> None:
    check_emulated(case, rows, schedule)


@settings(max_examples=50, deadline=None)
@given(case=paged_cases(), rows=boundaries(max_length=12), schedule=schedules)
def test_paged(case: Case, rows: Rows, schedule: Schedule) -> None:
    check_emulated(case, rows, schedule)


@pytest.mark.parametrize("schedule", [(0, 1, 1), (1, 3, 2000), (2, 0, 132 * 1024)])
@pytest.mark.parametrize(("layers", "moved"), [(3, 2), (2, 18), (66, 0)])
def test_many_tensors(layers: int, moved: int, schedule: Schedule) -> None:
    """Of rows and of caches more than one launch takes."""
    stage = image_plan(1, keep="1/3", text=2, vision=9, tail=1)
    rows = Rows({"hidden": torch.randn(12, 8), "stage": stage}, False)
    rows.arguments["others"] = [torch.arange(12) + i for i in range(moved)]
    k = [torch.randn(1, 14, 1, 2) for _ in range(layers)]
    wanted = [x.clone() for x in k]
    with backend("cpu"):
        truth = ops.boundary_step(**rows.arguments)
        ops.compact_kv_(wanted, None, stage, seq_lens=[14])
    cache = ops.DenseCache(k, None, seq_lens=Ints((14,), torch.tensor([14])))
    with outputs_of(rows) as outs:
        run = emulating_in_place(schedule, *outs)
        step = run(ops.compress_step, cache=cache, **rows.arguments)
    assert all(map(torch.equal, k, wanted))
    same_step(step.boundary, truth, close=None)
