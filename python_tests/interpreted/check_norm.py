"""downsample_add_rms_norm in Triton: the sum bit for bit, the norm as near as PyTorch's own."""

import pytest
import torch
from cases.downsample_add_rms_norm import DTYPES, check, check_error
from cases.run import on
from cases.segment_tables import FakeStage, image_stage, stage_of, stages
from hypothesis import given, settings
from hypothesis import strategies as st

from adsc_kernels import ops

TRITON = on("triton")
ROUNDING = {
    torch.float32: 2**-23,
    torch.float64: 2**-52,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=3 * ROUNDING[a.dtype], atol=1e-30)


@settings(max_examples=15, deadline=None)
@given(
    stage=stages(max_sequences=2, max_length=12),
    dtype=st.sampled_from(DTYPES),
    width=st.sampled_from([0, 1, 3, 8, 16, 40, 129]),
    offset=st.integers(0, 3),
    eps=st.sampled_from([0.0, 1e-6, 1e-5, 0.5]),
    seed=st.integers(0, 1000),
)
def test_equals_reference(
    stage: FakeStage, dtype: torch.dtype, width: int, offset: int, eps: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = stage.num_tokens_in
    x = random(rows, width + offset)[:, offset:]
    residual = random(rows + offset, width)[offset:]
    weight = random(width)
    check(stage, (x, residual, weight), TRITON, eps=eps, close=near)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [4096, 5120, 20000])
def test_wide_rows(width: int, dtype: torch.dtype) -> None:
    """20000 is more than a program holds at once, in every type."""
    stage = image_stage(text=3, vision=6, kept=2)
    x, residual = (torch.randn(stage.num_tokens_in, width).to(dtype) for _ in range(2))
    weight = torch.randn(width).to(dtype)
    check(stage, (x, residual, weight), TRITON, eps=1e-6, close=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_pytorch(dtype: torch.dtype) -> None:
    check_error(12, 4096, dtype, 1.0, TRITON)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_rows_past_the_last_that_moves_are_zero(eps: float) -> None:
    x = torch.randn(10, 4)
    stage = stage_of([[0, 0, 10, 5, 0, 0]], 7, 10)
    for out in TRITON(ops.downsample_add_rms_norm, x, x, torch.ones(4), stage, eps):
        assert out[:5].all()
        assert not out[5:].any()
