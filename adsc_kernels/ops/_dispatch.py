"""Registering an op, choosing its implementation, calling it, and what every op checks first."""

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from adsc_kernels.backend import INTERPRETED, native_problem, resolve


class Stage(Protocol):
    """What the ops need of a StagePlan: the movement of rows into a stage."""

    @property
    def segments(self) -> Tensor: ...  # int32 [S, 6], on the device of the rows

    @property
    def num_tokens(self) -> int: ...  # rows of the stage

    @property
    def num_tokens_in(self) -> int: ...  # rows of the stage before


def check_rows(x: Tensor, name: str) -> None:
    """x: [rows, ...], strided between rows at most."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got layout {x.layout}")
    if x.dim() == 0:
        raise ValueError(f"{name}: expected at least one dimension (rows first), got a scalar")
    if x.is_contiguous() or x.numel() == 0:
        return
    dense = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != dense:
            raise ValueError(
                f"{name}: expected rows that are contiguous inside (only dimension 0 may be "
                f"strided), got shape {tuple(x.shape)} with strides {tuple(x.stride())}"
            )
        dense *= size


def row_source(
    stage: Stage | None, keep_indices: Tensor | None, x: Tensor, name: str
) -> tuple[Tensor | None, int]:
    """The segment table (None with keep_indices) and the number of output rows."""
    if (stage is None) == (keep_indices is None):
        both = "both" if stage is not None else "neither"
        raise ValueError(f"stage, keep_indices: expected exactly one of them, got {both}")
    if keep_indices is not None:
        check_table(keep_indices, "keep_indices", (torch.int32, torch.int64), x, name)
        if keep_indices.dim() != 1:
            raise ValueError(
                f"keep_indices: expected shape [rows], got {tuple(keep_indices.shape)}"
            )
        _check_room(keep_indices.shape[0], x, name, "keep_indices")
        return None, keep_indices.shape[0]
    assert stage is not None  # for the type checker
    segments = stage.segments
    check_table(segments, "stage.segments", (torch.int32,), x, name)
    if segments.dim() != 2 or segments.shape[1] != 6:
        raise ValueError(f"stage.segments: expected shape [S, 6], got {tuple(segments.shape)}")
    if x.shape[0] != stage.num_tokens_in:
        raise ValueError(
            f"{name}: expected {stage.num_tokens_in} rows (stage.num_tokens_in), got {x.shape[0]}"
        )
    num_tokens = stage.num_tokens
    if num_tokens < 0:
        raise ValueError(f"num_tokens: expected at least 0, got {num_tokens}")
    if num_tokens > 0 and segments.shape[0] == 0:
        raise ValueError(
            f"segments: expected a table for {num_tokens} output rows, got an empty one"
        )
    _check_room(num_tokens, x, name, "segments")
    return segments, num_tokens


def _check_room(num_tokens: int, x: Tensor, x_name: str, name: str) -> None:
    if num_tokens > 0 and x.shape[0] == 0:
        raise ValueError(
            f"{name}: expected no output rows, since their sources lie in [0, 0), got 0 rows in "
            f"{x_name} and {num_tokens} output rows"
        )


def check_table(
    table: Tensor, name: str, dtypes: tuple[torch.dtype, ...], x: Tensor, x_name: str
) -> None:
    if not isinstance(table, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(table).__name__}")
    if table.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected {expected}, got {table.dtype}")
    if table.device != x.device:
        raise ValueError(f"{name}: expected the device of {x_name}, {x.device}, got {table.device}")
    if not table.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {table.stride()}")


_triton_ops = torch.library.Library("adsc_triton", "DEF")


def register(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
    triton: str | None = None,
) -> None:
    """What both `torch.ops.adsc_kernels` (schema and kernels: csrc/) and `torch.ops.adsc_triton`
    need of an op: shapes for tracing and, with backward and setup, gradients.

    schema: "(Tensor x, ...) -> Tensor", as in csrc/.
    backward: as for `torch.library.register_autograd`; ctx.ops is the namespace that ran forward.
    triton: the module in adsc_kernels/triton that defines a function of this name, imported when it
      is first called.
    """
    namespaces = [] if native_problem() else ["adsc_kernels"]
    if triton is not None:
        _triton_ops.define(name + schema)
        for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
            _triton_ops.impl(name, _imported(f"adsc_kernels.triton.{triton}", name), key)
        namespaces.append("adsc_triton")
    for namespace in namespaces:
        torch.library.register_fake(f"{namespace}::{name}", fake)
        if backward is not None and setup is not None:
            setup_here = _with_namespace(setup, getattr(torch.ops, namespace))
            torch.library.register_autograd(
                f"{namespace}::{name}", backward, setup_context=setup_here
            )


def _imported(module: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] | None = None

    def run(*arguments: Any) -> Any:
        nonlocal function
        if function is None:
            function = getattr(importlib.import_module(module), name)
        return function(*arguments)

    return run


def _with_namespace(setup: Callable[..., None], ops: Any) -> Callable[..., None]:
    def setup_here(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.ops = ops
        setup(ctx, inputs, output)

    return setup_here


def choose(name: str, device: torch.device) -> torch._ops.OpOverload | None:
    """The op that serves tensors on `device`; None where the reference does."""
    found = resolve(device)
    if found == "reference":
        return None
    ops = torch.ops.adsc_triton if found == "triton" else torch.ops.adsc_kernels
    return getattr(ops, name).default


def call(op: torch._ops.OpOverload, *arguments: Any, grad: bool) -> Any:
    """Calls op, past its autograd kernel where no gradient is asked for (grad is False).

    That kernel is Python, and takes longer than moving a small tensor does.
    """
    if torch.compiler.is_compiling() or (grad and torch.is_grad_enabled()):
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)
