"""What the launchers share: which rows move, units of access, the launch.

They check nothing: adsc_kernels.ops has, and it calls them with what it found to be right.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from adsc_kernels.backend import CHECK as CHECK
from adsc_kernels.backend import INTERPRETED


def row_map(
    segments: Tensor | None, keep_indices: Tensor | None, num_tokens: int, num_rows: int
) -> tuple[Any, ...]:
    """The fields of a `RowMap`, as kernels take them."""
    if segments is None:
        return (keep_indices, 0, 0, num_tokens, num_rows, True)
    count = segments.shape[0]
    return (segments, count, max(count - 1, 0).bit_length(), num_tokens, num_rows, False)


# As Triton's own, which on the host take ten times as long: they look for constants of kernels.


def cdiv(count: int, size: int) -> int:
    """How many pieces of that size hold so many."""
    return -(-count // size)


def next_power_of_2(n: int) -> int:
    """The least that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Unit(NamedTuple):
    """The widest piece of memory, at most 16 bytes, that all addresses involved are multiples of.

    Kernels address `words` words of `dtype` in a unit, and so know what is aligned.
    """

    size: int  # bytes
    words: int
    dtype: torch.dtype


def unit_of(*byte_counts: int) -> Unit:
    """The unit for these addresses, strides and lengths."""
    size = math.gcd(16, *byte_counts)
    word = min(size, 8)
    return Unit(size, size // word, _WORDS[word])


def launch(
    kernel: Any, programs: int, device: torch.device, arguments: Sequence[Any], **options: Any
) -> None:
    """`start`, of a kernel that verifies what it is given where CHECK says so."""
    options["CHECK"] = CHECK
    _start(kernel, programs, device, arguments, CHECK, options)


def start(
    kernel: Any,
    programs: int,
    device: torch.device,
    arguments: Sequence[Any],
    *,
    debug: bool = False,
    **options: Any,
) -> None:
    """Runs `programs` programs of a kernel on the current stream of `device`.

    arguments: those in front; constexprs may be among the options.
    debug: with the kernel's assertions.
    """
    _start(kernel, programs, device, arguments, debug, options)


def _start(
    kernel: Any,
    programs: int,
    device: torch.device,
    arguments: Sequence[Any],
    debug: bool,
    options: dict[str, Any],
) -> None:
    index = device.index
    if INTERPRETED or index is None:
        kernel[(programs,)](*map(_for_triton, arguments), debug=debug, **options)
    elif driver.active.get_current_device() == index:
        _start_here(kernel, programs, index, arguments, debug, options)
    else:
        with torch.cuda.device(device):
            _start_here(kernel, programs, index, arguments, debug, options)


class Packed(NamedTuple):
    """An argument whose maker knows what Triton compiles anew for in it, and looks at it once."""

    key: Any  # two that Triton would compile anew for never have the same
    value: Any  # as what was compiled takes it: tensors are addresses
    typed: Callable[[], Any]  # as Triton takes it, to compile for


def pointer(base: Tensor, dtype: torch.dtype) -> Packed:
    """A tensor's memory as elements of another type."""
    address = base.data_ptr()
    return Packed((dtype, address & 15), address, lambda: triton.reinterpret(base, dtype))


def packed(argument: tuple[Any, ...]) -> Packed:
    """A tuple that several launches take."""
    key: list[Any] = []
    value = _add_tuple(argument, key)
    return Packed(tuple(key), value, lambda: argument)


def _for_triton(argument: Any) -> Any:
    if type(argument) is Packed:
        return argument.typed()
    if isinstance(argument, tuple):
        parts = map(_for_triton, argument)
        return tuple(parts) if type(argument) is tuple else type(argument)(*parts)
    return argument


# ---- What was compiled, found without Triton's way through Python, which takes longer ----


class Compiled:
    """What has been compiled of one kernel, by what Triton compiles anew for."""

    def __init__(self, kernel: Any) -> None:
        self.parameters = [(p.is_constexpr, p.do_not_specialize) for p in kernel.params]
        self.by_key: dict[Any, Kept] = {}

    def key_of(self, arguments: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The parts of a call's key, and its arguments as what was compiled takes them.

        Calls of one key are served by one compiled kernel: the key holds all that Triton asks of an
        argument (a pointer's type and whether it is a multiple of 16; an integer's width, and of
        one that isn't free whether it is 1 or a multiple of 16; of all else the value), and more.
        """
        key: list[Any] = []
        values: list[Any] = []
        for argument, (constant, free) in zip(arguments, self.parameters, strict=False):
            if constant:
                key.append(argument)
                values.append(argument)
            elif free and type(argument) is int:
                key.append(argument >> 31)
                values.append(argument)
            elif free and isinstance(argument, Tensor):
                key += (argument.dtype, True)
                values.append(argument.data_ptr())
            else:
                _add(argument, key, values)
        return key, values


def _add(argument: Any, key: list[Any], values: list[Any]) -> None:
    """An argument that isn't free, or is neither an integer nor a tensor."""
    kind = type(argument)
    if kind is Packed:
        key += (Packed, argument.key)
        values.append(argument.value)
    elif kind is int:
        key.append(argument)
        values.append(argument)
    elif kind is Tensor or isinstance(argument, Tensor):
        address = argument.data_ptr()
        key += (argument.dtype, address & 15)
        values.append(address)
    elif isinstance(argument, tuple):
        values.append(_add_tuple(argument, key))
    else:
        key += (kind, argument)
        values.append(argument)


_INTS = {int}
_TENSORS = {Tensor}


def _add_tuple(argument: tuple[Any, ...], key: list[Any]) -> tuple[Any, ...]:
    """`_add` of a tuple's members, of which none is free, whatever the tuple is; their values."""
    kinds = set(map(type, argument))
    if kinds == _INTS and type(argument) is tuple:
        key.append(argument)
        return argument
    key += (type(argument), len(argument))
    if kinds == _TENSORS:
        addresses = tuple(map(Tensor.data_ptr, argument))
        key += [x.dtype for x in argument]
        key += [address & 15 for address in addresses]
        return addresses
    values: list[Any] = []
    for x in argument:
        _add(x, key, values)
    return tuple(values)


class Kept(NamedTuple):
    """A compiled kernel, and what its own way to a launch hands to its launcher."""

    compiled: Any
    run: Any  # None: of a Triton that has these by other names
    function: Any
    metadata: Any

    def start(self, programs: int, stream: int, values: Sequence[Any]) -> None:
        """Past Triton's way, which takes as long again, unless somebody listens in."""
        runtime = triton.knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if self.run is None or getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            self.compiled[(programs, 1, 1)](*values, stream=stream)
        else:
            hooks = (None, None, None)
            self.run(programs, 1, 1, stream, self.function, self.metadata, *hooks, *values)


def _kept(compiled: Any) -> Kept:
    names = ("run", "function", "packed_metadata")
    known = all(hasattr(compiled, name) for name in names)
    return Kept(compiled, *[getattr(compiled, name) if known else None for name in names])


_MOST = 1024  # strides and offsets are part of a key, so there is no end to keys
_compiled: dict[int, Compiled] = {}  # by the kernel's identity: its hash takes a lock


def compiled_of(kernel: Any) -> Compiled:
    """What has been compiled of `kernel`."""
    found = _compiled.get(id(kernel))
    if found is None:
        found = _compiled[id(kernel)] = Compiled(kernel)
    return found


def _start_here(
    kernel: Any,
    programs: int,
    device: int,
    arguments: Sequence[Any],
    debug: bool,
    options: dict[str, Any],
) -> None:
    known = compiled_of(kernel)
    parts, values = known.key_of(arguments)
    key = (device, debug, *options.values(), *options, *parts)
    kept = known.by_key.get(key)
    if kept is None:
        compiled = kernel[(programs,)](*map(_for_triton, arguments), debug=debug, **options)
        if len(known.by_key) >= _MOST:
            known.by_key.clear()
        if compiled is not None:  # a hook of Triton's may have taken the launch over
            known.by_key[key] = _kept(compiled)
        return
    values += [options[name] for name in kernel.arg_names[len(values) :]]
    kept.start(programs, driver.active.get_current_stream(device), values)
