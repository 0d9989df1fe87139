"""The norm's error against float64 is at most twice that of PyTorch's rms_norm on this device."""

from __future__ import annotations

import pytest
import torch
from cases.downsample_add_rms_norm import (
    check_every_16_bit_number,
    check_only_survivors_are_read,
    drawn,
)
from gpu_device import DEVICE, run_here
from torch.nn.functional import rms_norm

from adsc_kernels import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [64, 1000, 4096, 5120, 8192])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_at_most_twice_pytorchs(dtype: torch.dtype, hidden: int, scale: float) -> None:
    x, residual, weight = (t.to(DEVICE) for t in drawn(256, hidden, dtype, scale))
    rows = torch.arange(256, device=DEVICE)
    normed, summed = ops.downsample_add_rms_norm(x, residual, weight, eps=1e-6, keep_indices=rows)
    assert torch.equal(summed, x + residual)
    exact = summed.double()
    exact = exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    pytorch = rms_norm(summed, (hidden,), weight, 1e-6)
    error, limit = ((y.double() - exact).abs().max() for y in (normed, pytorch))
    assert error <= 2 * limit


@pytest.mark.parametrize("hidden", [64, 4096])
def test_float64(hidden: int) -> None:
    """To a few of its own roundings; PyTorch on this device is the only thing to compare with."""
    x, residual, weight = (t.to(DEVICE) for t in drawn(256, hidden, torch.float64))
    rows = torch.arange(256, device=DEVICE)
    normed, summed = ops.downsample_add_rms_norm(x, residual, weight, eps=1e-6, keep_indices=rows)
    assert torch.equal(summed, x + residual)
    torch.testing.assert_close(
        normed, rms_norm(summed, (hidden,), weight, 1e-6), rtol=1e-14, atol=1e-15
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(dtype: torch.dtype) -> None:
    check_every_16_bit_number(dtype, run_here)


def test_only_surviving_rows_are_read() -> None:
    check_only_survivors_are_read(512, torch.bfloat16, run_here)
