"""The norm's error against float64 is at most twice that of PyTorch's rms_norm on this device."""

from __future__ import annotations

import pytest
import torch
from gpu_device import DEVICE
from test_norm import drawn
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
    """Each of the 2^16 values plus 0, and plus another: subnormals, infinities, nans, ties."""
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)[:, None]
    every = torch.arange(len(values), device=DEVICE)
    one = torch.ones(1, dtype=dtype, device=DEVICE)
    for other in (torch.zeros_like(values), values.flip(0), values.roll(321, 0)):
        _, sums = ops.downsample_add_rms_norm(
            values.to(DEVICE), other.to(DEVICE), one, eps=0.0, keep_indices=every
        )
        wanted = values + other
        torch.testing.assert_close(sums.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


def test_only_surviving_rows_are_read() -> None:
    x, residual, weight = (t.to(DEVICE) for t in drawn(40, 512, torch.bfloat16))
    rows = torch.arange(0, 40, 3, device=DEVICE)
    wanted = ops.downsample_add_rms_norm(x, residual, weight, keep_indices=rows)
    dropped = torch.ones(40, dtype=torch.bool, device=DEVICE)
    dropped[rows] = False
    x[dropped], residual[dropped] = torch.nan, torch.inf
    got = ops.downsample_add_rms_norm(x, residual, weight, keep_indices=rows)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
