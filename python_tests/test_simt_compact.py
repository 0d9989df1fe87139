"""The CUDA compaction kernels, run by the emulator in random orders of threads and blocks.

An access outside of the caches, a race, or a row that is overwritten before it is read fails.
"""

from __future__ import annotations

import pytest
import torch
from cases.compact import Case, check, dense_cases, paged_cases
from cases.plans import image_plan
from hypothesis import given, settings
from simt import Schedule, emulated, emulating_in_place, needs_simt, schedules, serving

from adsc_kernels import CompressionSchedule, backend, make_plan, ops
from adsc_kernels.kv.pages import Ints

pytestmark = needs_simt


@settings(max_examples=60, deadline=None)
@given(case=dense_cases(), schedule=schedules)
def test_dense(case: Case, schedule: Schedule) -> None:
    check(case, emulating_in_place(schedule))


@settings(max_examples=60, deadline=None)
@given(case=paged_cases(), schedule=schedules)
def test_paged(case: Case, schedule: Schedule) -> None:
    check(case, emulating_in_place(schedule))


@pytest.mark.parametrize("schedule", [(0, 1, 1), (1, 3, 2000), (2, 0, 132 * 1024)])
@pytest.mark.parametrize(
    ("heads", "last", "dtype"),
    [(1, 600, torch.bfloat16), (2, 64, torch.bfloat16), (1, 1, torch.float32), (3, 5, torch.int8)],
)
@pytest.mark.parametrize("keep", ["0", "1/300", "1/3", "299/300", "1"])
def test_many_tiles(
    keep: str, heads: int, last: int, dtype: torch.dtype, schedule: Schedule
) -> None:
    """Several tiles of rows, strips of columns; a suffix longer than the gap overlaps itself."""
    stage = image_plan(1, keep=keep, text=5, vision=300, tail=0)
    shape = (1, 1100, heads, last)
    k = torch.randint(0, 100, shape, dtype=torch.int32).to(dtype)
    wanted = k.clone()
    with backend("cpu"):
        ops.compact_kv_(wanted, None, stage, seq_lens=[1100])
    total = Ints((1100,), torch.tensor([1100]))
    inputs = [stage.segments, stage.cu_seqlens, stage.cu_seqlens_in, total.device]
    with serving(), emulated(schedule, *inputs, writable=(k,)):
        ops.compact_kv_(k, None, stage, seq_lens=total)
    assert torch.equal(k, wanted)


@pytest.mark.parametrize("schedule", [(0, 1, 1), (1, 3, 2000), (2, 0, 132 * 1024)])
@pytest.mark.parametrize(("last", "dtype"), [(600, torch.bfloat16), (1, torch.float32)])
@pytest.mark.parametrize("pattern", ["start", "linspace"])
def test_a_page_that_is_moved_backwards(
    pattern: str, last: int, dtype: torch.dtype, schedule: Schedule
) -> None:
    """493 rows, several tiles of them, move to later places of the page that a text ends."""
    plan = CompressionSchedule.parse(f"1:488/1000@{pattern}", num_layers=2)
    stage = make_plan(plan, [0, 1045], [(0, 5, 1000)]).stages[1]
    pool = torch.randint(0, 100, (3, 512, 1, last), dtype=torch.int32).to(dtype)
    table = torch.tensor([[2, 0, 1]])
    wanted = pool.clone()
    with backend("reference"):
        result = ops.compact_paged_kv_(wanted, None, table, stage, edit_table=True)
    assert result.block_table is not None
    assert result.block_table.tolist() == [[0, 1, -1]]
    inputs = [stage.segments, stage.cu_seqlens, stage.cu_seqlens_in, table]
    with serving(), emulated(schedule, *inputs, writable=(pool,)):
        ops.compact_paged_kv_(pool, None, table, stage, edit_table=True)
    assert torch.equal(pool, wanted)
