"""downsample_add_rms_norm: the sum bit for bit, the norm within twice PyTorch's error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from adsc_kernels import ops
from cases.downsample import sources
from cases.run import Run, reference
from cases.segment_tables import FakeStage, image_stage, source_rows

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def drawn(rows: int, hidden: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * 1000 + hidden)
    x, residual = (
        torch.randn(2, rows, hidden, generator=generator, dtype=torch.float64) * scale
    ).to(dtype)
    weight = (torch.randn(hidden, generator=generator, dtype=torch.float64) + 1).to(dtype)
    return x, residual, weight


def in_wider_rows(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The same as rows of a wider matrix, such as the output of a fused projection."""
    return (
        torch.cat([x, x], 1)[:, : x.shape[1]],
        residual[:, None].expand(-1, 3, -1).contiguous()[:, 1],
    )


def check(
    stage: FakeStage,
    inputs: tuple[Tensor, ...],
    run: Run,
    *,
    eps: float = 1e-5,
    close: Callable[[Tensor, Tensor], None] = torch.testing.assert_close,
) -> list[Tensor]:
    """inputs: x, residual, weight. Returns the norms, of which check_error measures the error."""
    before = [x.clone() for x in inputs]
    wanted = reference(ops.downsample_add_rms_norm, *inputs, stage, eps)
    norms = []
    for source in sources(stage, torch.int32):
        normed, summed = run(ops.downsample_add_rms_norm, *inputs, eps=eps, **source)
        assert normed.is_contiguous() and normed.dtype == inputs[0].dtype
        assert torch.equal(summed, wanted[1])
        close(normed, wanted[0])
        norms.append(normed)
    assert all(map(torch.equal, inputs, before))
    return norms


def check_error(rows: int, hidden: int, dtype: torch.dtype, scale: float, run: Run) -> None:
    """At most twice that of PyTorch's rms_norm, beside NumPy's extended precision."""
    x, residual, weight = drawn(rows, hidden, dtype, scale)
    every = torch.arange(rows)
    normed, h = run(ops.downsample_add_rms_norm, x, residual, weight, eps=1e-6, keep_indices=every)
    assert torch.equal(h, x + residual)
    wide = h.double().numpy().astype("longdouble")
    scales = ((wide * wide).mean(-1, keepdims=True) + 1e-6) ** -0.5
    truth = wide * scales * weight.double().numpy().astype("longdouble")

    def error(y: Tensor) -> float:
        return float(abs(y.double().numpy() - truth).max())

    assert error(normed) <= 2 * error(rms_norm(h, (hidden,), weight, 1e-6))


def check_every_16_bit_number(dtype: torch.dtype, run: Run) -> None:
    """Each of the 2^16 values plus 0, and plus another: subnormals, infinities, nans, ties."""
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)[:, None]
    every = torch.arange(len(values))
    one = torch.ones(1, dtype=dtype)
    for other in (torch.zeros_like(values), values.flip(0), values.roll(321, 0)):
        _, sums = run(ops.downsample_add_rms_norm, values, other, one, eps=0.0, keep_indices=every)
        torch.testing.assert_close(sums, values + other, rtol=0, atol=0, equal_nan=True)


def check_only_survivors_are_read(hidden: int, dtype: torch.dtype, run: Run) -> None:
    stage = image_stage()
    x, residual, weight = drawn(stage.num_tokens_in, hidden, dtype)
    dropped = torch.ones(stage.num_tokens_in, dtype=torch.bool)
    dropped[source_rows(stage)] = False
    for source in sources(stage, torch.int64):
        clean = run(ops.downsample_add_rms_norm, x, residual, weight, **source)
        marked, residue = x.clone(), residual.clone()
        marked[dropped], residue[dropped] = torch.nan, torch.inf
        again = run(ops.downsample_add_rms_norm, marked, residue, weight, **source)
        assert all(map(torch.equal, clean, again))
