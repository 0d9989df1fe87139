"""Moving the rows that survive a boundary: `downsample` and `downsample_many`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adsc_kernels import fakes
from adsc_kernels.ops import _composed
from adsc_kernels.ops._dispatch import (
    call,
    choose,
    explain,
    native,
    register,
)
from adsc_kernels.rows import Stage, check_rows, list_of, movement, row_source


def downsample(
    x: Tensor, stage: Stage | None = None, *, keep_indices: Tensor | None = None
) -> Tensor:
    """The rows of `x` that survive into a stage, bit for bit.

    x: [T_in, ...], any dtype, any distance between rows; each row contiguous inside.
    stage: what gives the movement: anything with `.segments` (int32 [S, 6] on x's device),
      `.num_tokens` and `.num_tokens_in`, such as `plan.stages[s]`.
    keep_indices: int32 or int64 [T_out], in place of stage: the row of x that each output row
      takes, in any order, each in [0, T_in).
    Returns a new contiguous [T_out, ...]. Differentiable: a row that is dropped has gradient 0, and
    one taken several times gets the sum.

    Raises TypeError or ValueError, naming the argument, before anything is written; what a table or
    an index list holds is checked on CPU, where the host can read it. UnsupportedError where a
    backend named by `adsc.backend` can't serve x.
    """
    op = native("downsample", x)
    if op is None:
        arguments = _check(x, stage, keep_indices)
        return call(choose("downsample", x.device), *arguments, grad=x.requires_grad)
    try:
        moved = movement(stage, keep_indices, x.shape[0])
        return op[x.requires_grad and torch.is_grad_enabled()](x, *moved)
    except Exception as error:
        explain(error, _check, x, stage, keep_indices)


def _check(x: Tensor, stage: Stage | None, keep_indices: Tensor | None) -> tuple[Any, ...]:
    """The arguments of the op."""
    check_rows(x, "x")
    segments, num_tokens = row_source(stage, keep_indices, x, "x")
    return x, segments, keep_indices, num_tokens


def downsample_many(
    xs: Sequence[Tensor], stage: Stage | None = None, *, keep_indices: Tensor | None = None
) -> list[Tensor]:
    """`downsample` of several tensors with the same rows, in one call: hidden states, residual,
    positions, masks. Dtypes and trailing dimensions may differ.

    xs: at least one tensor [T_in, ...], all on one device. The rest as for `downsample`.
    Returns a list of new contiguous tensors [T_out, ...], in the order of xs.
    """
    xs = list_of(xs, "xs")
    op = native("downsample_many", xs[0] if xs else None)
    if op is None:
        arguments = _check_many(xs, stage, keep_indices)
        grad = True in [x.requires_grad for x in xs]
        return call(choose("downsample_many", xs[0].device), *arguments, grad=grad)
    try:
        grad = True in [x.requires_grad for x in xs] and torch.is_grad_enabled()
        return op[grad](xs, *movement(stage, keep_indices, xs[0].shape[0]))
    except Exception as error:
        explain(error, _check_many, xs, stage, keep_indices)


def _check_many(
    xs: list[Tensor], stage: Stage | None, keep_indices: Tensor | None
) -> tuple[Any, ...]:
    """The arguments of the op."""
    if not xs:
        raise ValueError("xs: expected at least one tensor, got none")
    for i, x in enumerate(xs):
        check_rows(x, f"xs[{i}]")
        if x.device != xs[0].device:
            raise ValueError(
                f"xs[{i}]: expected the device of xs[0], {xs[0].device}, got {x.device}"
            )
        if x.shape[0] != xs[0].shape[0]:
            raise ValueError(f"xs[{i}]: expected {xs[0].shape[0]} rows, as xs[0], got {x.shape[0]}")
    segments, num_tokens = row_source(stage, keep_indices, xs[0], "xs[0]")
    return xs, segments, keep_indices, num_tokens


# ---- Gradients: the backward of a gather is a scatter ----


_GRAD_DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128
)  # fmt: skip


def upsample_grad(
    ctx: Any, grad: Tensor, segments: Tensor | None, keep_indices: Tensor | None
) -> Tensor:
    """The gradient of x: [ctx.num_rows, ...], from that of x's surviving rows. Gradients come with
    any strides (that of a sum has all 0), hence the copy where a row is not dense."""
    if grad.dtype not in _GRAD_DTYPES:
        expected = ", ".join(str(dtype) for dtype in _GRAD_DTYPES)
        raise ValueError(f"grad: expected one of {expected}, got {grad.dtype}")
    op = ctx.ops.upsample_grad.default
    return op(grad.contiguous(), segments, keep_indices, ctx.num_rows)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, segments, keep_indices, _ = inputs
    ctx.save_for_backward(segments, keep_indices)
    ctx.num_rows = x.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    segments, keep_indices = ctx.saved_tensors
    return upsample_grad(ctx, grad, segments, keep_indices), None, None, None


def _setup_many(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    xs, segments, keep_indices, _ = inputs
    ctx.save_for_backward(segments, keep_indices)
    ctx.num_rows = xs[0].shape[0]
    ctx.wanted = [x.requires_grad for x in xs]


def _backward_many(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor | None] | None, ...]:
    segments, keep_indices = ctx.saved_tensors
    x_grads = [
        upsample_grad(ctx, grad, segments, keep_indices) if wanted else None
        for grad, wanted in zip(grads, ctx.wanted, strict=True)
    ]
    return x_grads, None, None, None


def _upsample_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, segments, keep_indices, _ = inputs
    ctx.save_for_backward(segments, keep_indices)
    ctx.num_tokens = grad.shape[0]


def _upsample_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    segments, keep_indices = ctx.saved_tensors
    op = ctx.ops.downsample.default
    return op(grad.contiguous(), segments, keep_indices, ctx.num_tokens), None, None, None


register(
    "downsample",
    "(Tensor x, Tensor? segments, Tensor? keep_indices, SymInt num_tokens) -> Tensor",
    fake=fakes.downsample,
    composed=_composed.downsample,
    backward=_backward,
    setup=_setup,
    triton="downsample",
)
register(
    "downsample_many",
    "(Tensor[] xs, Tensor? segments, Tensor? keep_indices, SymInt num_tokens) -> Tensor[]",
    fake=fakes.downsample_many,
    composed=_composed.downsample_many,
    backward=_backward_many,
    setup=_setup_many,
    triton="downsample",
)
register(
    "upsample_grad",
    "(Tensor grad, Tensor? segments, Tensor? keep_indices, SymInt num_rows) -> Tensor",
    fake=fakes.upsample_grad,
    composed=_composed.upsample_grad,
    backward=_upsample_backward,
    setup=_upsample_setup,
    triton="upsample_grad",
)
