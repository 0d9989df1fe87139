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
from triton.runtime.jit import TensorWrapper

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
        kernel[(programs,)](*arguments, debug=debug, **options)
    elif driver.active.get_current_device() == device.index:
        _start_here(kernel, programs, device.index, arguments, debug, options)
    else:
        with torch.cuda.device(device):
            _start_here(kernel, programs, device.index, arguments, debug, options)


# ---- What was compiled, found without Triton's way through Python, which takes longer ----


class Compiled:
    """What has been compiled of one kernel, by what Triton compiles anew for."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.free = [p.do_not_specialize and not p.is_constexpr for p in kernel.params]
        self.by_key: dict[Any, Any] = {}

    def key_of(self, arguments: Sequence[Any]) -> tuple[tuple[Any, ...], list[Any]]:
        """The key of a call, and its arguments as what was compiled takes them.

        Calls of one key are served by one compiled kernel: the key holds all that Triton asks of an
        argument (a pointer's type and whether it is a multiple of 16; an integer's width, and of
        one that isn't free whether it is 1 or a multiple of 16; of all else the value), and more.
        """
        key: list[Any] = []
        values: list[Any] = []
        for argument, free in zip(arguments, self.free, strict=False):
            _add(argument, free, key, values)
        return tuple(key), values


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
    key, values = known.key_of(arguments)
    key = (device, debug, *options.values(), *options, key)
    compiled = known.by_key.get(key)
    if compiled is None:
        compiled = kernel[(programs,)](*arguments, debug=debug, **options)
        if len(known.by_key) >= _MOST:
            known.by_key.clear()
        known.by_key[key] = compiled
        return
    values += [options[name] for name in kernel.arg_names[len(values) :]]
    compiled[(programs, 1, 1)](*values, stream=driver.active.get_current_stream(device))


def _add(argument: Any, free: bool, key: list[Any], values: list[Any]) -> None:
    kind = type(argument)
    if kind is int:
        key.append(argument >> 31 if free else argument)
        values.append(argument)
    elif isinstance(argument, Tensor | TensorWrapper):
        address = argument.data_ptr()
        key.append((argument.dtype, free or address % 16))
        values.append(address)
    elif isinstance(argument, tuple):
        if kind is tuple and all(type(x) is int for x in argument):
            key.append(argument)
            values.append(argument)
            return
        inner_key: list[Any] = []
        inner: list[Any] = []
        for x in argument:  # none is free, whatever the tuple is
            _add(x, False, inner_key, inner)
        key.append(tuple(inner_key))
        values.append(tuple(inner))
    else:
        key.append((kind, argument))
        values.append(argument)


pointer = triton.reinterpret
