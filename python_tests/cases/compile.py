"""Samples of the ops for opcheck, and functions of them to be compiled.

Their tensors are made on import, on the device that is torch's default then.
"""
# ruff: noqa: E501 (tables of cases, one a line)

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adsc_kernels import CompressionSchedule, make_plan, ops
from adsc_kernels.rows import Stage
from cases.segment_tables import FakeStage, image_stage, stage_of

OPS = torch.ops.adsc_kernels
STAGE = stage_of([[0, 0, 3, 3, 0, 0], [3, 3, 6, 3, 0, 0], [6, 9, 0, 0, 0, 0]], 6, 9)
TABLE = STAGE.segments
ROWS = torch.tensor([8, 0, 0, 3])
CU = torch.tensor([0, 9], dtype=torch.int32)
SPANS = torch.tensor([[0, 3, 6, 2, 3]], dtype=torch.int32)


def x(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


SAMPLES = {
    "downsample": (OPS.downsample, (x(9, 4), TABLE, None, 6)),
    "downsample indices": (OPS.downsample, (x(9), None, ROWS, 4)),
    "downsample strided": (OPS.downsample, (torch.randn(9, 8)[:, :4], TABLE, None, 6)),
    "downsample to nothing": (OPS.downsample, (x(9, 4), None, ROWS[:0], 0)),
    "downsample_many": (OPS.downsample_many, ([x(9, 4), torch.arange(9), x(9, grad=False)], TABLE, None, 6)),
    "upsample_grad": (OPS.upsample_grad, (x(6, 4), TABLE, None, 9)),
    "upsample_grad indices": (OPS.upsample_grad, (x(4, dtype=torch.bfloat16), None, ROWS, 9)),
    "downsample_add_rms_norm": (OPS.downsample_add_rms_norm, (x(9, 4), x(9, 4), x(4), TABLE, None, 6, 1e-6)),
    "norm indices": (OPS.downsample_add_rms_norm, (x(9, 4), x(9, 4), x(4), None, ROWS, 4, 1e-6)),
    "rebuild_metadata": (OPS.rebuild_metadata, (CU, SPANS, [1, 2], "center", 0)),
    "rebuild_metadata grid": (OPS.rebuild_metadata, (CU, SPANS, [1, 2, 2, 3], "grid", 4)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def boundary(
    hidden: Tensor, residual: Tensor, weight: Tensor, positions: Tensor, stage: Stage
) -> tuple[Tensor, ...]:
    """What a decoder does at a boundary, with work of its own on either side."""
    normed, residual = ops.downsample_add_rms_norm(hidden * 2, residual, weight, stage)
    moved, positions = ops.downsample_many([hidden, positions], stage)
    return normed + 1, residual, ops.downsample(hidden, stage) + moved, positions


def boundary_of_indices(
    hidden: Tensor, residual: Tensor, weight: Tensor, positions: Tensor, rows: Tensor
) -> tuple[Tensor, ...]:
    normed, residual = ops.downsample_add_rms_norm(hidden, residual, weight, keep_indices=rows)
    return normed, residual, *ops.downsample_many([hidden, positions], keep_indices=rows)


def planned(batch: int, text: int) -> Stage:
    schedule = CompressionSchedule.parse("2:1/4", num_layers=4)
    length = 24 + text
    cu_seqlens = [length * b for b in range(batch + 1)]
    return make_plan(schedule, cu_seqlens, [(b, text // 2, 24) for b in range(batch)]).stages[1]


def faked(batch: int, text: int) -> FakeStage:
    return image_stage(batch, text=text, vision=24, kept=6)


def batch_of(stage: Stage) -> tuple[Tensor, ...]:
    rows = stage.num_tokens_in
    return torch.randn(rows, 32), torch.randn(rows, 32), torch.randn(32), torch.arange(rows)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right)
