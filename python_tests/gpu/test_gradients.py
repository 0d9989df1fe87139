"""Gradients: gradcheck in float64, duplicates summed, second order."""

from __future__ import annotations

import pytest
import torch
from cases.downsample import check_duplicates
from cases.downsample_add_rms_norm import drawn
from cases.segment_tables import stage_of
from gpu_device import DEVICE, on_device, run_here, to_device

from adsc_kernels import ops

STAGE = to_device(stage_of([[0, 0, 2, 2, 0, 0], [2, 2, 5, 3, 0, 1]], 5, 7))
DUPLICATES = on_device([3, 3, 0, 1, 3])
WHERE = {"stage": {"stage": STAGE}, "indices": {"keep_indices": DUPLICATES}}


@pytest.mark.parametrize("where", WHERE)
def test_downsample(where: str) -> None:
    x = torch.randn(7, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    z = torch.randn(7, dtype=torch.complex128, device=DEVICE, requires_grad=True)

    def moved(x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        left, right = ops.downsample_many([x, z], **WHERE[where])
        return ops.downsample(x, **WHERE[where]), left, right

    assert torch.autograd.gradcheck(moved, (x, z))
    assert torch.autograd.gradgradcheck(moved, (x, z))


@pytest.mark.parametrize("where", WHERE)
def test_downsample_add_rms_norm(where: str) -> None:
    inputs = [t.to(DEVICE).requires_grad_() for t in drawn(7, 4, torch.float64)]

    def op(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.downsample_add_rms_norm(*inputs, **WHERE[where])

    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_duplicates_are_summed_in_float(dtype: torch.dtype) -> None:
    check_duplicates(dtype, run_here)
