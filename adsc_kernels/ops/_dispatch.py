"""Registering an op, choosing its implementation, and calling it."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from adsc_kernels import reference
from adsc_kernels.backend import INTERPRETED, native_for, native_problem, resolve
from adsc_kernels.kv.tensors import Places, check_no_transform, check_writable

_libraries = {
    "adsc_kernels": torch.library.Library("adsc_kernels", "FRAGMENT"),
    "adsc_triton": torch.library.Library("adsc_triton", "DEF"),
}

# Shapes are all that a meta tensor has, and any op that is registered gives them.
_ON_META = "triton" if native_problem() else "cpu"

# The native ops by name, in C alone (`_in_c`): the one that autograd passes by, whose kernel in
# Python takes longer than moving a small tensor does, and the one that it sees. So one is told by
# whether a gradient is asked for. An op that writes to caches has in its place the one that takes
# them by the number under which the library keeps them.
_native: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}

# Each is asked in each call, and takes longer to find than to answer.
_is_compiling = torch.compiler.is_compiling
_num_modes = torch._C._len_torch_dispatch_stack
_transforms_are_active = torch._C._are_functorch_transforms_active
_is_traced = torch._C._is_tracing
_is_profiled = torch._C._autograd._profiler_enabled
_sees_functions = torch._C._is_torch_function_mode_enabled


class _InTriton:
    """An op that Triton serves: as the dispatcher knows it, and the function that it calls."""

    def __init__(self, op: Callable[..., Any], function: Callable[..., Any]) -> None:
        self.op = op
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.op(*arguments)


_in_triton: dict[str, _InTriton] = {}


def register(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
    composed: Callable[..., Any] | None = None,
    triton: str | None = None,
) -> None:
    """What both `torch.ops.adsc_kernels` (schema and kernels: csrc/) and `torch.ops.adsc_triton`
    need of an op: shapes for tracing, and what autograd does: gradients with backward and setup, or
    version counters where the schema says that the op writes to its arguments.

    schema: "(Tensor x, ...) -> Tensor", as in csrc/.
    backward: as for `torch.library.register_autograd`; ctx.ops is the namespace that ran forward.
    composed: the op in torch's own ops, for torch.func and forward-mode AD; with backward.
    triton: the module in adsc_kernels/triton that defines a function of this name, imported when it
      is first called.
    """
    namespaces = [] if native_problem() else ["adsc_kernels"]
    if triton is not None:
        library = _libraries["adsc_triton"]
        library.define(name + schema)
        function = _imported(f"adsc_kernels.triton.{triton}", name)
        for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
            library.impl(name, function, key)
        _in_triton[name] = _InTriton(getattr(torch.ops.adsc_triton, name).default, function)
        namespaces.append("adsc_triton")
    for namespace in namespaces:
        library = _libraries[namespace]
        torch.library.register_fake(f"{namespace}::{name}", _on_one_device(fake))
        op = getattr(getattr(torch.ops, namespace), name).default
        if namespace == "adsc_kernels":
            packet = getattr(torch.ops.adsc_kernels, name)
            library.impl(f"{name}.raw", torch.library.fallthrough_kernel, "Autograd")
            other = op
            if op._schema.is_mutable:
                other = packet.kept
                library.impl(f"{name}.kept", torch.library.fallthrough_kernel, "Autograd")
            _native[name] = _in_c(packet.raw), _in_c(other)
        if backward is not None and setup is not None and composed is not None:
            setup_here = _with_namespace(setup, getattr(torch.ops, namespace))
            info = Info(backward, setup_here)
            kernel = _with_transforms(make_autograd_impl(op, info), composed)
            library.impl(name, kernel, "Autograd", with_keyset=True)
            library.impl(name, composed, "FuncTorchBatched")
        elif op._schema.is_mutable:
            library.impl(name, _writing(op), "ADInplaceOrView", with_keyset=True)


def _in_c(op: Any) -> Callable[..., Any]:
    """An overload as the dispatcher has it: without OpOverload's function in Python, and without
    the search of every argument for a __torch_function__, which takes a tenth of a call."""
    schema = op._schema
    handle = torch._C._dispatch_find_schema_or_throw(schema.name, schema.overload_name)
    return partial(torch._C._dispatch_call_boxed, handle)


def _on_one_device(fake: Callable[..., Any]) -> Callable[..., Any]:
    """A meta tensor among others brings a call here, where nobody has looked at it yet."""

    def run(*arguments: Any) -> Any:
        tensors = [x for a in arguments for x in (a if isinstance(a, list | tuple) else (a,))]
        devices = list(dict.fromkeys(x.device for x in tensors if isinstance(x, Tensor)))
        if len(devices) > 1:
            raise ValueError(
                f"tensors: expected all on one device, got some on {devices[0]} and on {devices[1]}"
            )
        return fake(*arguments)

    return run


def _with_transforms(
    kernel: Callable[..., Any], composed: Callable[..., Any]
) -> Callable[..., Any]:
    """The autograd kernel, which knows nothing of torch.func and drops tangents, and what does."""

    def run(keyset: Any, *arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active() or _has_tangent(arguments):
            return composed(*arguments)
        return kernel(keyset, *arguments)

    return run


def _has_tangent(arguments: tuple[Any, ...]) -> bool:
    if forward_ad._current_level < 0:
        return False
    tensors = (x for a in arguments for x in (a if isinstance(a, list) else (a,)))
    return any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )


def _writing(op: Any) -> Callable[..., Any]:
    """What torch's in-place ops do: autograd learns by version counters what was written."""
    written = [i for i, a in enumerate(op._schema.arguments) if a.is_write]
    below = torch._C._after_ADInplaceOrView_keyset

    def run(keyset: Any, *arguments: Any) -> Any:
        tensors = [x for i in written for x in arguments[i]]
        check_no_transform("caches")
        for i, x in enumerate(tensors):
            check_writable(x, f"caches[{i}]")
        result = op.redispatch(keyset & below, *arguments)
        increment_version(tensors)
        return result

    return run


def _imported(module: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] | None = None

    def run(*arguments: Any, **known: Any) -> Any:
        nonlocal function
        if function is None:
            function = getattr(importlib.import_module(module), name)
        return function(*arguments, **known)

    return run


def _with_namespace(setup: Callable[..., None], ops: Any) -> Callable[..., None]:
    def setup_here(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.ops = ops
        setup(ctx, inputs, output)

    return setup_here


def choose(name: str, device: torch.device) -> Callable[..., Any]:
    """What serves an op's tensors on `device`: native, Triton or the reference, called alike."""
    found = resolve(device)
    if found == "reference" and device.type == "meta":
        found = _ON_META
    if found == "reference":
        function: Callable[..., Any] = getattr(reference, name)
        return function
    if found == "triton" and not (_is_compiling() or device.type == "meta"):
        return _in_triton[name]
    ops = torch.ops.adsc_triton if found == "triton" else torch.ops.adsc_kernels
    return getattr(ops, name).default


def native(name: str, like: Any) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The native op for `like` and what goes with it, where nothing comes in between, as a pair:
    the one to call where no gradient is asked for, and the one where one is; of the ops on caches
    the one that takes their tensors, and the one that takes a number (`Caches.number`).

    It checks its arguments itself before it writes. So a public function hands them over as they
    are, and looks at them only when they are refused (`explain`). None where another backend
    serves, under torch.compile, transforms and modes of either kind, and where like is no plain
    tensor: those check nothing, and the function does first.
    """
    if (
        _is_compiling()
        or type(like) is not Tensor
        or _num_modes()
        or _sees_functions()
        or _transforms_are_active()
        or forward_ad._current_level >= 0
        or not native_for(like)
    ):
        return None
    return _native[name]


def asks_gradient(*inputs: Any) -> bool:
    """Whether a native call's inputs, of which some may be None, ask for one."""
    return torch._C._any_requires_grad(*inputs) and torch.is_grad_enabled()


def explain(error: Exception, check: Callable[..., Any], *arguments: Any) -> NoReturn:
    """Raises what check says of arguments that an op has refused, else what the op says."""
    try:
        check(*arguments)
    except Exception as words:
        raise words from None
    raise _refusal(error)


def _refusal(error: Exception) -> Exception:
    """A native op's error, of the type that it had in C++: torch 2.15 makes RuntimeErrors of all.
    What is no refusal (no memory, no stream) doesn't say what was expected.
    """
    if type(error) is RuntimeError and ": expected " in str(error):
        return ValueError(str(error))
    return error


_PLAIN = {Tensor, torch.nn.Parameter}


def _passes_by(
    op: Callable[..., Any], arguments: tuple[Any, ...], written: list[Tensor] | None = None
) -> bool:
    """Whether op is Triton's and the dispatcher, which takes as long as half of the call, would do
    nothing but hand it the arguments: no mode, trace or profile sees the call, and no tensor is of
    a kind of its own or stands for its negative or conjugate.

    written: one of the arguments, whose rows only change places, whatever they stand for.
    """
    if type(op) is not _InTriton or _num_modes() or _is_traced() or _is_profiled():
        return False
    if written is not None and not _PLAIN.issuperset(map(type, written)):
        return False
    for argument in arguments:
        if argument is written:
            continue
        for x in argument if type(argument) is list else (argument,):
            if isinstance(x, Tensor) and (type(x) not in _PLAIN or x.is_neg() or x.is_conj()):
                return False
    return True


def call(op: Callable[..., Any], *arguments: Any, grad: bool) -> Any:
    """Calls what `choose` gave, past its autograd kernel where no gradient is asked for; under
    torch.compile and transforms as it is."""
    if _is_compiling():
        return op(*arguments)
    try:
        if (
            forward_ad._current_level >= 0
            or _transforms_are_active()
            or (grad and torch.is_grad_enabled())
        ):
            return op(*arguments)
        if _passes_by(op, arguments):
            return op.function(*arguments)  # type: ignore[attr-defined]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)
    except RuntimeError as error:
        raise _refusal(error) from None


def call_in_place(
    op: Callable[..., Any], *arguments: Any, written: list[Tensor], places: Places | None
) -> Any:
    """Calls what `choose` gave, whose arguments `check_writable` has passed, and does for autograd
    what op's kernel in Python (`_writing`) would, in less time.

    places: of written, where they are known.
    """
    if _is_compiling():
        return op(*arguments)
    try:
        if _passes_by(op, arguments, written):
            results = op.function(*arguments, places=places)  # type: ignore[attr-defined]
        else:
            with torch._C._AutoDispatchBelowADInplaceOrView():
                results = op(*arguments)
    except RuntimeError as error:
        raise _refusal(error) from None
    increment_version(written)
    return results
