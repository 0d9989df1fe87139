"""What the launchers share: which rows move, units of access, the launch.

They check nothing: adsc_kernels.ops has, and it calls them with what it found to be right.
"""

import math
from collections.abc import Sequence
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
    count = 0 if segments is None else len(segments)
    rows = keep_indices if segments is None else segments
    return (rows, count, max(count - 1, 0).bit_length(), num_tokens, num_rows, segments is None)


class RowLayout(NamedTuple):
    """Rows along dimension 0, any distance apart, each dense inside. In bytes."""

    size: int
    stride: int


def row_layout(x: Tensor) -> RowLayout:
    """x: [rows, ...]."""
    width = x.element_size()
    return RowLayout(math.prod(x.shape[1:]) * width, x.stride(0) * width)


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
    start(kernel, programs, device, arguments, debug=CHECK, CHECK=CHECK, **options)


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
    if INTERPRETED or device.type != "cuda":
        kernel[(programs,)](*map(_for_triton, arguments), debug=debug, **options)
    elif driver.active.get_current_device() == device.index:
        _start_here(kernel, programs, device.index, arguments, debug, options)
    else:
        with torch.cuda.device(device):
            _start_here(kernel, programs, device.index, arguments, debug, options)


class Pointer:
    """A tensor's memory as elements of another type: what `triton.reinterpret` makes, in a tenth of
    the time."""

    __slots__ = ("address", "base", "dtype")

    def __init__(self, base: Tensor, dtype: torch.dtype) -> None:
        self.base = base
        self.dtype = dtype
        self.address = base.data_ptr()


def _for_triton(argument: Any) -> Any:
    if type(argument) is Pointer:
        return triton.reinterpret(argument.base, argument.dtype)
    if isinstance(argument, tuple):
        parts = map(_for_triton, argument)
        return tuple(parts) if type(argument) is tuple else type(argument)(*parts)
    return argument


# ---- What was compiled, found without Triton's way through Python, which takes longer ----


class Compiled:
    """What has been compiled of one kernel, by what Triton compiles anew for."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.parameters = [(p.is_constexpr, p.do_not_specialize) for p in kernel.params]
        self.by_key: dict[Any, Any] = {}

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
            else:
                _add(argument, free, key, values)
        return key, values


def _add(argument: Any, free: bool, key: list[Any], values: list[Any]) -> None:
    kind = type(argument)
    if kind is int:
        key.append(argument >> 31 if free else argument)
        values.append(argument)
    elif kind is Pointer:
        key += (argument.dtype, free or argument.address & 15)
        values.append(argument.address)
    elif kind is Tensor or isinstance(argument, Tensor):
        address = argument.data_ptr()
        key += (argument.dtype, free or address & 15)
        values.append(address)
    elif isinstance(argument, tuple):
        if kind is tuple and all(type(x) is int for x in argument):
            key.append(argument)
            values.append(argument)
            return
        inner: list[Any] = []
        key += (kind, len(argument))
        for x in argument:  # none is free, whatever the tuple is
            _add(x, False, key, inner)
        values.append(tuple(inner))
    else:
        key += (kind, argument)
        values.append(argument)


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
    compiled = known.by_key.get(key)
    if compiled is None:
        compiled = kernel[(programs,)](*map(_for_triton, arguments), debug=debug, **options)
        if len(known.by_key) >= _MOST:
            known.by_key.clear()
        known.by_key[key] = compiled
        return
    values += [options[name] for name in kernel.arg_names[len(values) :]]
    compiled[(programs, 1, 1)](*values, stream=driver.active.get_current_stream(device))
