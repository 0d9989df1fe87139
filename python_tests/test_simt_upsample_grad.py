"""The CUDA upsample_grad, run on a CPU, against the CPU kernel: the same sums in the same order."""

import torch
from cases.segment_tables import FakeStage, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import Schedule, emulated, guards_intact, needs_simt, schedules
from torch import Tensor

pytestmark = needs_simt

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def check(
    grad: Tensor, table: Tensor | None, rows: Tensor | None, num_rows: int, schedule: Schedule
) -> None:
    with emulated(schedule, grad, table, rows):
        out = torch.ops.adsc_simt.upsample_grad(grad, table, rows, num_rows)
    assert torch.equal(out, torch.ops.adsc_kernels.upsample_grad(grad, table, rows, num_rows))
    assert guards_intact(out)


@settings(max_examples=50, deadline=None)
@given(stages(max_length=12), st.sampled_from([1, 3, 8, 264]), st.sampled_from(DTYPES), schedules)
def test_of_a_stage(stage: FakeStage, width: int, dtype: torch.dtype, schedule: Schedule) -> None:
    grad = torch.randn(stage.num_tokens, width).to(dtype)
    check(grad, stage.segments, None, stage.num_tokens_in, schedule)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 12), max_size=60),
    st.sampled_from([torch.int32, torch.int64]),
    st.sampled_from([1, 3, 264]),
    st.sampled_from(DTYPES),
    schedules,
)
def test_of_indices(
    rows: list[int], wide: torch.dtype, width: int, dtype: torch.dtype, schedule: Schedule
) -> None:
    grad = torch.randn(len(rows), width).to(dtype)
    check(grad, None, torch.tensor(rows, dtype=wide), 13, schedule)


def test_more_takers_than_a_block_lists() -> None:
    rows = torch.randint(0, 3, (5000,), generator=torch.Generator().manual_seed(0))
    check(torch.randn(5000, 5), None, rows, 13, (1, 3, 1))
