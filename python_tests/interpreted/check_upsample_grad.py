"""Gradients in Triton against the native CPU kernels, whose sums have the same order."""

import pytest
import torch
from cases.downsample import check_duplicates
from cases.run import on
from cases.segment_tables import FakeStage, image_stage, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels import ops
from adsc_kernels.backend import backend

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128
]  # fmt: skip


def both(*arguments: object) -> tuple[Tensor, Tensor]:
    spaces = torch.ops.adsc_triton, torch.ops.adsc_kernels
    found, wanted = (space.upsample_grad.default(*arguments) for space in spaces)
    return found, wanted


@settings(max_examples=15, deadline=None)
@given(
    stage=stages(max_sequences=2, max_length=12),
    dtype=st.sampled_from(DTYPES),
    trailing=st.sampled_from([(), (1,), (3,), (8,), (2, 3), (0,), (40,)]),
    seed=st.integers(0, 99),
)
def test_segments(
    stage: FakeStage, dtype: torch.dtype, trailing: tuple[int, ...], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(stage.num_tokens, *trailing, dtype=dtype, generator=generator)
    found, wanted = both(grad, stage.segments, None, stage.num_tokens_in)
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)


@settings(max_examples=15, deadline=None)
@given(
    indices=st.lists(st.integers(0, 12), max_size=40),
    width=st.sampled_from([torch.int32, torch.int64]),
    dtype=st.sampled_from(DTYPES),
    trailing=st.sampled_from([(), (3,), (8,)]),
)
def test_indices(
    indices: list[int], width: torch.dtype, dtype: torch.dtype, trailing: tuple[int, ...]
) -> None:
    grad = torch.randn(len(indices), *trailing, dtype=dtype)
    found, wanted = both(grad, None, torch.tensor(indices, dtype=width), 13)
    assert torch.equal(found, wanted)


def test_segments_in_any_order_and_over_each_other() -> None:
    """No planner writes such a table, but an op takes it."""
    table = torch.tensor([[0, 4, 6, 3, 0, 0], [3, 0, 5, 5, 0, 0], [8, 2, 4, 2, 0, 1]]).int()
    found, wanted = both(torch.randn(10, 3), table, None, 10)
    assert torch.equal(found, wanted)


def test_wide_rows() -> None:
    stage = image_stage(text=3, vision=8, kept=2)
    found, wanted = both(torch.randn(stage.num_tokens, 2500), stage.segments, None, 11)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_duplicates_are_summed_in_float(dtype: torch.dtype) -> None:
    check_duplicates(dtype, on("triton"))


def test_the_backward_stays_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    from adsc_kernels.triton import upsample_grad

    real = upsample_grad.launch
    monkeypatch.setattr(
        upsample_grad, "launch", lambda *a, **k: (calls.append(a[0]), real(*a, **k))
    )
    x = torch.randn(11, 2, requires_grad=True)
    with backend("triton"):
        moved = ops.downsample(x, image_stage(text=3, vision=8, kept=2))
    moved.sum().backward()
    assert len(calls) == 2


def test_a_dtype_without_sums_is_an_error() -> None:
    x = torch.ones(3, 2).to(torch.float8_e4m3fn).requires_grad_()
    with backend("triton"):
        moved = ops.downsample(x, keep_indices=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"^grad: .*float8_e4m3fn"):
        moved.backward(torch.ones_like(moved))


def test_gradcheck() -> None:
    stage = image_stage(text=2, vision=4, kept=2)
    x, y = (torch.randn(6, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.randn(2, dtype=torch.float64, requires_grad=True)
    with backend("triton"):
        assert torch.autograd.gradgradcheck(lambda x: ops.downsample(x, stage), x, fast_mode=True)
        assert torch.autograd.gradcheck(
            lambda *t: ops.downsample_add_rms_norm(*t, stage), (x, y, w), fast_mode=True
        )
        assert torch.autograd.gradcheck(
            lambda x, y: tuple(ops.downsample_many([x, y], stage)), (x, y), fast_mode=True
        )
