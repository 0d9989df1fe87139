"""Which implementation an op runs on: native kernels, Triton, or the reference.

`auto` takes the native kernel for the tensor's device, else Triton, else the reference. A backend
named outright serves the tensor or raises: it never falls back. CUDA devices differ: each is asked
about once, when its first tensor comes, since asking at import would start CUDA.
"""

import functools
import os
import threading
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Final, TypeVar

import torch

from adsc_kernels import _library, checks
from adsc_kernels.errors import UnsupportedError

BACKENDS: Final = ("auto", "cuda", "triton", "cpu", "reference")
ENVIRONMENT: Final = "ADSC_BACKEND"

# The choice of this thread. A plain thread-local, since Dynamo reads it and guards on it, which it
# does not do for a ContextVar.
_choice = threading.local()


_default = checks.choice(ENVIRONMENT, os.environ.get(ENVIRONMENT) or "auto", BACKENDS)
_choice.name = _default  # for the main thread: a look-up that fails costs ten times as much


class backend:
    """Runs the ops of a `with` block, in this thread, on one backend.

    name: "auto", "cuda", "triton", "cpu" or "reference". Blocks nest; the innermost wins. Outside
    of any block the environment variable ADSC_BACKEND decides, read once at import (default
    "auto").
    Raises ValueError for another name, TypeError for what is none.
    """

    def __init__(self, name: str) -> None:
        self.name = checks.choice("backend", name, BACKENDS)
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


# Ops verify on the device, before they write, what only contents show (csrc/ reads it once too).
CHECK: Final = os.environ.get("ADSC_CHECK") == "1"

# Triton reads it when a kernel is defined, so a later change has no effect.
INTERPRETED: Final = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y")
_OLDEST_TRITON: Final = (3, 5)
_OLDEST_CAPABILITY: Final = (8, 0)


@functools.cache
def _triton_package_problem() -> str:
    """Why Triton can't be used at all; empty when it can. Does not import it."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "the package triton is not installed (pip install 'triton>=3.5')"
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST_TRITON:
        return f"triton>=3.5 is needed, {found} is installed"
    return ""


def _device_problem(index: int) -> str:
    """Why PyTorch can't use CUDA device number `index`; empty when it can."""
    if torch.version.cuda is None:
        return f"no CUDA in torch {torch.__version__}"
    if index >= torch.cuda.device_count():
        return f"no CUDA device {index}"
    return ""


def _cuda_problem(index: int) -> str:
    problem = native_problem() or _device_problem(index)
    if problem:
        return problem
    try:
        _library.device_code(index)
    except UnsupportedError as error:
        return str(error)
    return ""


def _triton_problem(kind: str, index: int) -> str:
    problem = _triton_package_problem()
    if problem:
        return problem
    if kind == "cpu":
        return "" if INTERPRETED else "no interpreter for CPU tensors without TRITON_INTERPRET=1"
    problem = _device_problem(index)
    if problem:
        return problem
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST_CAPABILITY:
        return f"no compute capability of 8.0 or more: device {index} has {capability}"
    return ""


F = TypeVar("F", bound=Callable[..., object])


def constant_in_graphs(function: F) -> F:
    """torch.compiler.assume_constant_result, which imports Dynamo: twice the time of torch itself.

    The mark is all that it sets; a test compiles with it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_problems: dict[tuple[str, str, int], str] = {}


@constant_in_graphs
def _problem(name: str, kind: str, index: int) -> str:
    """Why a backend, not "auto", can't serve tensors on a device; empty when it can."""
    key = name, kind, index
    if key not in _problems:
        serves = {"cuda": ("cuda",), "triton": ("cuda", "cpu"), "cpu": ("cpu",)}.get(name, (kind,))
        if name == "reference":
            problem = ""
        elif kind not in serves:
            problem = f"it serves tensors on {' and '.join(serves)}"
        elif name == "triton":
            problem = _triton_problem(kind, index)
        else:
            problem = _cuda_problem(index) if name == "cuda" else native_problem()
        _problems[key] = problem
    return _problems[key]


# The interpreter is for tests: on CPU, Triton serves only when it is named.
_automatic_on_cpu: Final = "reference" if native_problem() else "cpu"
_automatic_on_cuda: dict[int, str] = {}


@constant_in_graphs
def _for_cuda(index: int) -> str:
    """The first of the backends that serves CUDA device number `index`."""
    if index not in _automatic_on_cuda:
        serving = [name for name in ("cuda", "triton") if not _problem(name, "cuda", index)]
        _automatic_on_cuda[index] = (*serving, "reference")[0]
    return _automatic_on_cuda[index]


def resolve(device: torch.device) -> str:
    """The backend, never "auto", that serves a tensor on `device`.

    Raises UnsupportedError where the backend named outright can't.
    """
    name = current()
    kind = device.type
    if name == "auto":
        if kind == "cpu":
            return _automatic_on_cpu
        return _for_cuda(device.index or 0) if kind == "cuda" else "reference"
    problem = _problem(name, kind, device.index or 0)
    if problem:
        raise UnsupportedError(f"backend {name!r} can't serve a tensor on {device}: {problem}")
    return name


def native_for(x: torch.Tensor) -> bool:
    """Whether `resolve` names native kernels for x; it raises nothing. Asked in each call."""
    name = getattr(_choice, "name", _default)  # current()
    if name == "auto":
        if x.is_cpu:
            return _automatic_on_cpu == "cpu"
        return x.is_cuda and _for_cuda(x.get_device()) == "cuda"
    return (name == "cpu" or name == "cuda") and not _problem(name, x.device.type, x.get_device())


def triton_runs(device: torch.device) -> bool:
    """Whether to run what only Triton has in one launch: it may beside native kernels."""
    name = resolve(device)
    return name == "triton" or (
        name == "cuda" and not _problem("triton", "cuda", device.index or 0)
    )


def available_backends() -> dict[str, tuple[bool, str]]:
    """Every backend with whether it serves some device here and, where it serves none, why not."""
    devices = [("cuda", index) for index in range(max(torch.cuda.device_count(), 1))]
    found = {}
    for name in BACKENDS[1:]:
        kinds = {"cuda": devices, "triton": [*devices, ("cpu", 0)]}.get(name, [("cpu", 0)])
        problems = list(dict.fromkeys(_problem(name, *device) for device in kinds))
        works = "" in problems
        found[name] = (works, "" if works else "; ".join(problems))
    return found
