"""All that a boundary does, in one launch: `boundary_step`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adsc_kernels import checks, fakes
from adsc_kernels.ops import _composed
from adsc_kernels.ops._dispatch import (
    asks_gradient,
    call,
    choose,
    explain,
    native,
    register,
)
from adsc_kernels.ops.downsample import upsample_grad
from adsc_kernels.ops.downsample_add_rms_norm import (
    check_eps,
    check_norm,
    is_usual_eps,
    norm_gradients,
)
from adsc_kernels.ops.rebuild_metadata import (
    Keep,
    Metadata,
    as_ints,
    check_layout,
)
from adsc_kernels.plan import Once
from adsc_kernels.rows import Stage, check_rows, list_of, movement, row_source


@dataclass(frozen=True)
class BatchLayout:
    """A boundary over a layout that only the device knows, in place of a stage.

    cu_seqlens, spans, keep, pattern, max_height: as for `rebuild_metadata`; cu_seqlens may end
    before the last row of hidden, whose other rows are not read.
    num_tokens: rows to allocate for the stage: at least as many as it has. Those past its last come
      out as zeros, so a captured graph may allocate for the longest batch it will see.
    """

    cu_seqlens: Tensor
    spans: Tensor
    keep: Keep | tuple[Keep, Keep]
    pattern: str = "start"
    max_height: int | None = None
    num_tokens: int = field(kw_only=True)

    def fractions(self) -> list[Fraction]:
        """What stays: of a span, or of a grid's rows and columns. Raises where a field is bad."""
        checks.integer("layout.num_tokens", self.num_tokens, 0)
        return check_layout(self.cu_seqlens, self.spans, self.keep, self.pattern, self.max_height)

    @Once
    def arguments(self) -> tuple[Any, ...]:
        """The fields as an op takes them, up to num_tokens, looked at once: they never change.

        What the two tensors are by the time of a call is the op's to check.
        """
        keep = as_ints(self.fractions())
        return self.cu_seqlens, self.spans, keep, self.pattern, self.max_height or 0


class BoundaryStep(NamedTuple):
    """The stage that a boundary opens: its rows, and its metadata where a BatchLayout was given."""

    hidden: Tensor  # [T_out, ...]
    residual: Tensor | None
    others: list[Tensor]
    metadata: Metadata | None


def boundary_step(
    hidden: Tensor,
    stage: Stage | None = None,
    *,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    others: Sequence[Tensor] = (),
    keep_indices: Tensor | None = None,
    layout: BatchLayout | None = None,
) -> BoundaryStep:
    """Everything that changes at a boundary, in one launch on CUDA. More take: over 16 tensors
    (one for every 16); a norm of doubles, or of rows off 16-byte addresses; a layout of over 128
    sequences or spans.

    hidden: [T_in, ...], any dtype, any distance between rows, each row contiguous inside.
    stage, keep_indices or layout: exactly one. The first two as for `downsample`; a `BatchLayout`
      where only the device knows the batch: the same launch then computes the stage's metadata.
    residual and weight: both or neither. With them the step is that of a pre-norm decoder, as
      `downsample_add_rms_norm`: hidden is [T_in, hidden size], and the results are
      hidden = rms_norm(hidden + residual) * weight and residual = hidden + residual.
      Without them hidden is moved as it is, and the residual is None.
    others: tensors [T_in, ...] of any dtypes that are moved bit for bit: positions, RoPE tables,
      masks, deepstack features.
    Returns `BoundaryStep`; all its tensors are new and contiguous. Differentiable in hidden,
    residual, weight and others; dropped rows have gradient 0.

    Raises TypeError or ValueError naming the argument, before anything is written; what tables and
    layouts hold is checked on CPU, where the host can read it.
    """
    others = list_of(others, "others")
    given = (hidden, stage, residual, weight, eps, others, keep_indices, layout)
    op = native("boundary_step", hidden) if is_usual_eps(eps) else None
    if op is None:
        arguments = check_boundary(*given)
        grad = needs_grad(hidden, residual, weight, others)
        outputs = call(choose("boundary_step", hidden.device), *arguments, grad=grad)
    else:
        try:
            grad = asks_gradient(hidden, residual, weight, *others)
            outputs = op[grad](*boundary_arguments(*given))
        except Exception as error:
            explain(error, check_boundary, *given)
    return step_of(outputs, residual is not None, len(others), layout is not None)


def needs_grad(
    hidden: Tensor, residual: Tensor | None, weight: Tensor | None, others: list[Tensor]
) -> bool:
    """`asks_gradient` in words that Dynamo can trace; `call` asks whether gradients are enabled."""
    return (
        hidden.requires_grad
        or (residual is not None and residual.requires_grad)
        or (weight is not None and weight.requires_grad)
        or True in [x.requires_grad for x in others]
    )


_NO_LAYOUT = (None, None, (), "start", 0)  # cu_seqlens, spans, keep, pattern, max_height


def boundary_arguments(
    hidden: Tensor,
    stage: Stage | None,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    others: list[Tensor],
    keep_indices: Tensor | None,
    layout: BatchLayout | None,
) -> tuple[Any, ...]:
    """The arguments of a native op, which checks them, but what it isn't told."""
    if layout is None:
        segments, indices, num_tokens = movement(stage, keep_indices, hidden.shape[0])
        return (hidden, residual, weight, eps, others, segments, indices, *_NO_LAYOUT, num_tokens)
    if (
        type(layout) is not BatchLayout
        or type(layout.keep) is list  # which may have changed
        or stage is not None
        or keep_indices is not None
    ):
        return check_boundary(hidden, stage, residual, weight, eps, others, keep_indices, layout)
    rows = (hidden, residual, weight, eps, others, None, None)
    return (*rows, *layout.arguments, layout.num_tokens)


def check_boundary(
    hidden: Tensor,
    stage: Stage | None,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    others: list[Tensor],
    keep_indices: Tensor | None,
    layout: BatchLayout | None,
) -> tuple[Any, ...]:
    """The arguments of the op. Raises as `boundary_step`."""
    _check_inputs(hidden, residual, weight, eps, others)
    segments, cu_seqlens, spans = None, None, None
    fractions: list[Fraction] = []
    pattern, max_height = "start", 0
    if layout is None:
        segments, num_tokens = row_source(stage, keep_indices, hidden, "hidden")
    else:
        if not isinstance(layout, BatchLayout):
            raise TypeError(f"layout: expected a BatchLayout, got {type(layout).__name__}")
        if stage is not None or keep_indices is not None:
            other = "keep_indices" if stage is None else "stage"
            raise ValueError(
                f"stage, keep_indices, layout: expected exactly one of them, got layout and {other}"
            )
        fractions = layout.fractions()
        cu_seqlens, spans, num_tokens = layout.cu_seqlens, layout.spans, layout.num_tokens
        pattern, max_height = layout.pattern, layout.max_height or 0
        if cu_seqlens.device != hidden.device:
            raise ValueError(
                f"cu_seqlens: expected the device of hidden, {hidden.device}, "
                f"got {cu_seqlens.device}"
            )
    return (
        hidden,
        residual,
        weight,
        float(eps),
        others,
        segments,
        keep_indices,
        cu_seqlens,
        spans,
        as_ints(fractions),
        pattern,
        max_height,
        num_tokens,
    )


def _check_inputs(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    others: list[Tensor],
) -> None:
    if (residual is None) != (weight is None):
        only = "weight" if residual is None else "residual"
        raise ValueError(f"residual, weight: expected both or neither, got only {only}")
    if residual is not None and weight is not None:
        check_norm(hidden, "hidden", residual, weight, eps)
    else:
        check_rows(hidden, "hidden")
        check_eps(eps, torch.float64)
    for i, x in enumerate(others):
        check_rows(x, f"others[{i}]")
        if x.device != hidden.device:
            raise ValueError(
                f"others[{i}]: expected the device of hidden, {hidden.device}, got {x.device}"
            )
        if x.shape[0] != hidden.shape[0]:
            raise ValueError(
                f"others[{i}]: expected {hidden.shape[0]} rows, as hidden, got {x.shape[0]}"
            )


def step_of(
    outputs: list[Tensor], has_residual: bool, num_others: int, has_layout: bool
) -> BoundaryStep:
    """outputs: what the op returns."""
    first = 1 + has_residual
    last = first + num_others
    return BoundaryStep(
        outputs[0],
        outputs[1] if has_residual else None,
        outputs[first:last],
        Metadata(*outputs[last:]) if has_layout else None,
    )


# ---- Gradients ----


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, residual, weight, ctx.eps, others, segments, keep_indices, cu_seqlens, *rest = inputs
    num_rows = None
    if cu_seqlens is not None:
        metadata = Metadata(*output[-len(Metadata._fields) :])
        segments, num_rows = metadata.segments, metadata.num_tokens
    h = None if residual is None else output[1]
    ctx.save_for_backward(h, weight, segments, keep_indices, num_rows)
    ctx.num_rows = hidden.shape[0]
    ctx.keep_grad = None if rest[1] else []  # an empty list is one of tensors to autograd
    ctx.hidden_wanted = hidden.requires_grad
    ctx.others_wanted = [x.requires_grad for x in others]


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    h, weight, segments, keep_indices, num_rows = ctx.saved_tensors

    def scatter(grad: Tensor) -> Tensor:
        return upsample_grad(ctx, grad, segments, keep_indices)

    grad_hidden = grad_residual = grad_weight = None
    if h is not None:
        grad_h, grad_weight = norm_gradients(h, weight, ctx.eps, grads[0], grads[1], num_rows)
        grad_hidden = grad_residual = scatter(grad_h)
    elif ctx.hidden_wanted:
        grad_hidden = scatter(grads[0])
    first = 1 if h is None else 2
    grad_others = [
        scatter(grads[first + i]) if wanted else None for i, wanted in enumerate(ctx.others_wanted)
    ]
    tables = (None, None, None, None)  # segments, keep_indices, cu_seqlens, spans
    return (
        grad_hidden,
        grad_residual,
        grad_weight,
        None,
        grad_others,
        *tables,
        ctx.keep_grad,
        None,
        None,
        None,
    )


register(
    "boundary_step",
    "(Tensor hidden, Tensor? residual, Tensor? weight, float eps, Tensor[] others, "
    "Tensor? segments, Tensor? keep_indices, Tensor? cu_seqlens, Tensor? spans, int[] keep, "
    "str pattern, SymInt max_height, SymInt num_tokens) -> Tensor[]",
    fake=fakes.boundary_step,
    composed=_composed.boundary_step,
    backward=_backward,
    setup=_setup,
    triton="boundary_step",
)
