"""What a case is run by: each backend has a Run, which calls an op and returns its outputs.

One on another device moves the arguments there and the outputs back, so that a case sees the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from adsc_kernels.backend import backend

Run = Callable[..., Any]  # (op, *arguments, **options)


def on(name: str) -> Run:
    """Of the backend `name`, in this process."""

    def run(op: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with backend(name):
            return op(*arguments, **options)

    return run


reference = on("reference")


def tensors(output: Any) -> list[Tensor]:
    """Every tensor in a tensor, a list, a tuple or None, in order."""
    if output is None:
        return []
    if isinstance(output, Tensor):
        return [output]
    return [t for part in output for t in tensors(part)]
