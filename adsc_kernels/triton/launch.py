"""What the launchers share: which rows move, units of access, the launch.

They check nothing: adsc_kernels.ops has, and it calls them with what it found to be right.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from adsc_kernels.backend import CHECK as CHECK


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

    debug: with the kernel's assertions.
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, debug=debug, **options)


pointer = triton.reinterpret
