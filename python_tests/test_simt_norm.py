"""The CUDA downsample_add_rms_norm, run on a CPU: the sum bit for bit, the norm by its error."""

import pytest
import torch
from cases.segment_tables import FakeStage, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import Schedule, emulated, guards_intact, needs_simt, schedules, shifted
from torch import Tensor

from adsc_kernels import reference

pytestmark = needs_simt

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def drawn(rows: int, hidden: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * 1000 + hidden)
    x, residual = (
        torch.randn(2, rows, hidden, generator=generator, dtype=torch.float64) * scale
    ).to(dtype)
    weight = (torch.randn(hidden, generator=generator, dtype=torch.float64) + 1).to(dtype)
    return x, residual, weight


@settings(max_examples=60, deadline=None)
@given(
    stage=stages(max_length=12),
    hidden=st.sampled_from([0, 1, 7, 8, 64, 255, 512, 1032]),
    dtype=st.sampled_from(DTYPES),
    offset=st.sampled_from([0, 0, 1, 4]),
    wide=st.booleans(),
    schedule=schedules,
)
def test_equals_reference(
    stage: FakeStage,
    hidden: int,
    dtype: torch.dtype,
    offset: int,
    wide: bool,
    schedule: Schedule,
) -> None:
    x, residual, weight = drawn(stage.num_tokens_in, hidden, dtype)
    if wide:  # rows of a wider matrix, such as the output of a fused projection
        x = torch.cat([x, x], 1)[:, :hidden]
        residual = residual[:, None].expand(-1, 3, -1).contiguous()[:, 1]
    x, weight = shifted(x, offset), shifted(weight, offset)
    op = torch.ops.adsc_simt.downsample_add_rms_norm
    with emulated(schedule, x, residual, weight, stage.segments):
        outs = op(x, residual, weight, stage.segments, None, stage.num_tokens, 1e-5)
    normed, residual_out = reference.downsample_add_rms_norm(x, residual, weight, stage, 1e-5)
    assert torch.equal(outs[1], residual_out)
    torch.testing.assert_close(outs[0], normed)  # the error itself: the test below
    assert all(map(guards_intact, outs))
    rows = torch.tensor(reference.source_rows(stage), dtype=torch.int64)
    with emulated(schedule, x, residual, weight, rows):
        again = op(x, residual, weight, None, rows, len(rows), 1e-5)
    assert torch.equal(again[0], outs[0]) and torch.equal(again[1], residual_out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 4096, 5121])
def test_error_at_most_twice_pytorchs(dtype: torch.dtype, hidden: int) -> None:
    rows = torch.arange(16)
    x, residual, weight = drawn(16, hidden, dtype, 3.0)
    with emulated((0, 1, 1), x, residual, weight, rows):
        normed, h = torch.ops.adsc_simt.downsample_add_rms_norm(
            x, residual, weight, None, rows, 16, 1e-6
        )
    assert torch.equal(h, x + residual)
    wide = h.numpy() if dtype == torch.float64 else h.double().numpy()
    wide = wide.astype("longdouble")  # beyond float64, which is one of the types
    weights = weight.double().numpy().astype("longdouble")
    truth = wide * ((wide * wide).mean(-1, keepdims=True) + 1e-6) ** -0.5 * weights

    def error(y: Tensor) -> float:
        return float(abs(y.double().numpy() - truth).max())

    pytorch = torch.nn.functional.rms_norm(h, (hidden,), weight, 1e-6)
    assert error(normed) <= 2 * error(pytorch)
