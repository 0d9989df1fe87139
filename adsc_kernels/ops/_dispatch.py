"""Registering an op, choosing its implementation, and calling it."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from adsc_kernels import reference
from adsc_kernels.backend import INTERPRETED, native_problem, resolve

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


def choose(name: str, device: torch.device) -> Callable[..., Any]:
    """What serves an op's tensors on `device`: native, Triton or the reference, called alike."""
    found = resolve(device)
    if found == "reference":
        function: Callable[..., Any] = getattr(reference, name)
        return function
    ops = torch.ops.adsc_triton if found == "triton" else torch.ops.adsc_kernels
    return getattr(ops, name).default


def call(op: Callable[..., Any], *arguments: Any, grad: bool) -> Any:
    """Calls op, past its autograd kernel where no gradient is asked for (grad is False).

    That kernel is Python, and takes longer than moving a small tensor does.
    """
    if torch.compiler.is_compiling() or (grad and torch.is_grad_enabled()):
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)
