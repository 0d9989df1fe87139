"""What the launchers share: which rows move, checks as in csrc/ops, units of access, the launch."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from adsc_kernels.backend import CHECK as CHECK

# Arguments that differ from batch to batch: the code is the same for all their values. `steps` is
# the number of those of a binary search over the segments.
BATCH_ARGUMENTS = ["rows", "num_segments", "steps", "num_tokens", "num_rows"]


class RowMap(NamedTuple):
    """Which source row each output row takes: a segment table or a list of indices."""

    arguments: tuple[Any, ...]  # of every kernel that takes BATCH_ARGUMENTS
    by_index: bool


def row_map(
    segments: Tensor | None,
    keep_indices: Tensor | None,
    num_tokens: int,
    num_rows: int,
    device: torch.device,
) -> RowMap:
    """Raises ValueError for a table or a list that can't describe the movement."""
    if (segments is None) == (keep_indices is None):
        raise ValueError(
            "segments, keep_indices: expected exactly one of them, got "
            + ("neither" if segments is None else "both")
        )
    if num_tokens < 0:
        raise ValueError(f"num_tokens: expected at least 0, got {num_tokens}")
    rows, name = (segments, "segments") if segments is not None else (keep_indices, "keep_indices")
    assert rows is not None  # for the type checker
    if rows.device != device:
        raise ValueError(f"{name}: expected the device of x, {device}, got {rows.device}")
    if not rows.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {rows.stride()}")
    if segments is not None:
        if segments.dtype != torch.int32 or segments.dim() != 2 or segments.shape[1] != 6:
            raise ValueError(
                f"segments: expected a contiguous int32 table [S, 6], got {segments.dtype} and "
                f"shape {tuple(segments.shape)}"
            )
        if num_tokens > 0 and len(segments) == 0:
            raise ValueError(
                f"segments: expected a table for {num_tokens} output rows, got an empty one"
            )
    else:
        if rows.dtype not in (torch.int32, torch.int64) or rows.shape != (num_tokens,):
            raise ValueError(
                f"keep_indices: expected int32 or int64 [{num_tokens}], got {rows.dtype} and "
                f"shape {tuple(rows.shape)}"
            )
    if num_tokens > 0 and num_rows == 0:
        raise ValueError(f"{name}: expected no output rows for x without rows, got {num_tokens}")
    count = len(segments) if segments is not None else 0
    steps = max(count - 1, 0).bit_length()
    return RowMap((rows, count, steps, num_tokens, num_rows), segments is None)


class RowLayout(NamedTuple):
    """Rows along dimension 0, any distance apart, each dense inside. In elements."""

    num_rows: int
    size: int
    stride: int


def row_layout(x: Tensor, name: str) -> RowLayout:
    """Raises ValueError where rows are not dense inside."""
    if x.dim() == 0:
        raise ValueError(f"{name}: expected at least one dimension (rows first), got a scalar")
    size = math.prod(x.shape[1:])
    if not x.is_contiguous() and x.numel() > 0:
        dense = 1
        for length, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
            if length != 1 and stride != dense:
                raise ValueError(
                    f"{name}: expected rows that are contiguous inside (only dimension 0 may be "
                    f"strided), got shape {tuple(x.shape)} with strides {x.stride()}"
                )
            dense *= length
    return RowLayout(x.shape[0], size, x.stride(0))


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
