"""downsample_add_rms_norm: the sum bit for bit, the norm within twice PyTorch's error."""

import pytest
import torch
from cases.downsample_add_rms_norm import (
    DTYPES,
    check,
    check_error,
    check_every_16_bit_number,
    check_only_survivors_are_read,
    drawn,
    in_wider_rows,
)
from cases.refused import BY_THE_OP
from cases.refused.downsample_add_rms_norm import BAD_CALLS, STAGE, W, X
from cases.run import on
from cases.segment_tables import FakeStage, image_stage, source_rows, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels import ops


@settings(max_examples=100, deadline=None)
@given(
    stage=stages(),
    hidden=st.sampled_from([0, 1, 2, 7, 32, 64, 511, 512, 513, 1500]),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
)
def test_equals_reference(stage: FakeStage, hidden: int, dtype: torch.dtype, wide: bool) -> None:
    x, residual, weight = drawn(stage.num_tokens_in, hidden, dtype)
    if wide:
        x, residual = in_wider_rows(x, residual)
    norms = check(stage, (x, residual, weight), on("cpu"))
    assert all(torch.equal(norm, norms[0]) for norm in norms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 4096, 5120])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_error_at_most_twice_pytorchs(dtype: torch.dtype, hidden: int, scale: float) -> None:
    check_error(64, hidden, dtype, scale, on("cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(dtype: torch.dtype) -> None:
    check_every_16_bit_number(dtype, on("cpu"))


def test_only_surviving_rows_are_read() -> None:
    check_only_survivors_are_read(8, torch.float32, on("cpu"))


def test_threads_agree() -> None:
    stage = image_stage(2)
    x, residual, weight = drawn(stage.num_tokens_in, 1024, torch.bfloat16)
    threads, outs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs.append(ops.downsample_add_rms_norm(x, residual, weight, stage)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("keep_indices", [None, torch.tensor([6, 0, 0])])
def test_gradcheck(keep_indices: Tensor | None) -> None:
    x, residual, weight = (t.requires_grad_() for t in drawn(7, 4, torch.float64))
    stage = STAGE if keep_indices is None else None

    def op(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return ops.downsample_add_rms_norm(x, residual, weight, stage, keep_indices=keep_indices)

    assert torch.autograd.gradcheck(op, (x, residual, weight))
    assert torch.autograd.gradgradcheck(op, (x, residual, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_close_to_pytorchs(dtype: torch.dtype) -> None:
    """The same through PyTorch's own ops in float64; dropped rows exactly 0."""
    stage = image_stage()
    rows = torch.tensor(source_rows(stage))
    inputs = [t.requires_grad_() for t in drawn(stage.num_tokens_in, 64, dtype)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    grads = drawn(stage.num_tokens, 64, dtype)[:2]

    torch.autograd.backward(ops.downsample_add_rms_norm(*inputs, stage), grads)
    h = wide[0][rows] + wide[1][rows]
    normed = torch.nn.functional.rms_norm(h, (64,), wide[2], 1e-6)
    torch.autograd.backward([normed, h], [g.double() for g in grads])
    tolerance = {
        torch.float64: 1e-12,
        torch.float32: 1e-5,
        torch.float16: 6e-3,
        torch.bfloat16: 5e-2,
    }
    for mine, truth in zip(inputs, wide, strict=True):
        assert mine.grad is not None
        assert truth.grad is not None
        assert mine.grad.dtype == dtype
        worst = (mine.grad.double() - truth.grad).abs().max() / truth.grad.abs().max()
        assert worst < tolerance[dtype]
    dropped = torch.ones(stage.num_tokens_in, dtype=torch.bool)
    dropped[rows] = False
    assert inputs[0].grad is not None
    assert not inputs[0].grad[dropped].any()


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name: str) -> None:
    bad_call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        bad_call()


def test_the_op_itself_checks_too() -> None:
    op = torch.ops.adsc_kernels.downsample_add_rms_norm
    table = STAGE.segments
    for x, residual, weight, eps, message in [
        (X[0], X, W, 0.0, "^x: .*hidden"),
        (X, X[:6], W, 0.0, r"^residual: .*\[7, 4\], got \[6, 4\]"),
        (X, X.double(), W, 0.0, "^residual: .*dtype"),
        (X, X, W[:3], 0.0, r"^weight: .*\[4\], got shape \[3\]"),
        (X, X, W.half(), 0.0, "^weight: .*dtype"),
        (X + 0j, X + 0j, W + 0j, 0.0, "^x: .*float32"),
        (X.int(), X.int(), W.int(), 0.0, "^x: .*float32"),
        (X, X, W, -1.0, "^eps: "),
    ]:
        with pytest.raises(BY_THE_OP, match=message):
            op(x, residual, weight, table, None, 5, eps)
