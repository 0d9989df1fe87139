"""Which implementation an op runs on: native kernels, Triton, or the reference.

`auto` takes the native kernel for the tensor's device, else Triton, else the reference. A backend
named outright serves the tensor or raises: it never falls back.
"""

import functools
import os
import threading
from types import TracebackType
from typing import Final

import torch

from adsc_kernels import _library
from adsc_kernels.errors import UnsupportedError

BACKENDS: Final = ("auto", "cuda", "triton", "cpu", "reference")
ENVIRONMENT: Final = "ADSC_BACKEND"

# The choice of this thread. A plain thread-local, since Dynamo reads it and guards on it, which it
# does not do for a ContextVar.
_choice = threading.local()


def _checked(name: object, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return str(name)


_default = _checked(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT)
_choice.name = _default  # for the main thread: a look-up that fails costs ten times as much


class backend:
    """Runs the ops of a `with` block, in this thread, on one backend.

    name: "auto", "cuda", "triton", "cpu" or "reference". Blocks nest; the innermost wins. Outside
    of any block the environment variable ADSC_BACKEND decides, read once at import (default
    "auto").
    Raises ValueError for another name.
    """

    def __init__(self, name: str) -> None:
        self.name = _checked(name, "backend")
        self._outer: list[str] = []

    def __enter__(self) -> "backend":
        self._outer.append(current())
        _choice.name = self.name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _choice.name = self._outer.pop()


def current() -> str:
    """The name in force in this thread, "auto" included."""
    return getattr(_choice, "name", _default)


@functools.cache
def native_problem() -> str:
    """Why the native library can't be used; empty when it is loaded."""
    try:
        _library.load()
    except ImportError as error:
        return str(error)
    return ""


# Neither is part of this version; the reasons are what `adsc doctor` prints.
_NO_CUDA = "no CUDA kernels in this version of adsc_kernels"
_NO_TRITON = "no Triton kernels in this version of adsc_kernels"


def available_backends() -> dict[str, tuple[bool, str]]:
    """Every backend with whether it works here and, where it doesn't, why not."""
    problem = native_problem()
    return {
        "cuda": (False, _NO_CUDA),
        "triton": (False, _NO_TRITON),
        "cpu": (problem == "", problem),
        "reference": (True, ""),
    }


# Filled at import, so that a traced call reads a constant.
_problems: Final = {name: why for name, (_, why) in available_backends().items()}
_native_devices: Final = frozenset(name for name in ("cpu", "cuda") if not _problems[name])


def resolve(device: torch.device) -> str:
    """The backend, never "auto", that serves a tensor on `device`.

    Raises UnsupportedError where the backend named outright can't.
    """
    name = current()
    kind = device.type
    if name == "auto":
        return kind if kind in _native_devices else "reference"
    if _problems[name]:
        raise UnsupportedError(f"backend {name!r} is not available: {_problems[name]}")
    if name != "reference" and kind != name:
        raise UnsupportedError(
            f"backend {name!r}: expected tensors on {name}, got a tensor on {device}"
        )
    return name
