"""How the tensors of a KV cache lie in memory, which the kernel that moves them is compiled for."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from adsc_kernels.triton.launch import cdiv, next_power_of_2, unit_of

_STRIP_WORDS = 64  # of a line, moved by one program: 512 bytes
_TILE_WORDS = 2048  # 16 words of 8 bytes for each of 128 threads
_TILE_ROWS = 128


class Tile(NamedTuple):
    """What the move of one geometry is compiled for."""

    LINES: int  # of a tensor
    WORDS: int  # of a unit, which offsets and strides count
    WIDTH: int  # words of a line
    STRIP: int  # words of a line that one program moves
    ROWS: int  # read before any of them is written


class Lines(NamedTuple):
    """A tensor as lines of bytes, one for each head or one for all; strides in bytes."""

    block_stride: int
    token_stride: int
    line_stride: int
    num_lines: int
    line_bytes: int


def lines_of(
    sizes: Sequence[int], steps: Sequence[int], width: int, rank: int, layout: str, by_head: bool
) -> Lines:
    """Of a tensor of these sizes and strides with elements of width bytes.

    rank: that of the caches. Scales may lack the last dimension, or that and the heads.
    """
    shape = list(sizes)
    strides = [step * width for step in steps]
    if rank == 3:
        shape, strides = [1, *shape], [0, *strides]
    if len(sizes) == rank - 2:
        shape, strides = [*shape, 1], [*strides, 0]
    elif layout == "HND":
        shape[1:3], strides[1:3] = shape[2:0:-1], strides[2:0:-1]
    if len(sizes) < rank:
        shape, strides = [*shape, 1], [*strides, width]
    heads, line_bytes = shape[2], shape[3] * width
    if not by_head and (heads == 1 or strides[2] == line_bytes):
        return Lines(strides[0], strides[1], 0, 1, heads * line_bytes)
    return Lines(strides[0], strides[1], strides[2], heads, line_bytes)


class Geometry(NamedTuple):
    """What the move of tensors that are alike is compiled for, and what programs it takes."""

    dtype: torch.dtype  # of words
    unit: int  # bytes
    strides: tuple[int, int, int]  # units
    tile: Tile
    parts: int  # of a tensor's rows of one sequence, a program each


@functools.lru_cache(maxsize=1024)
def geometry_of(
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    alignment: int,
    rank: int,
    block_size: int,
    cache_layout: str,
    by_head: bool,
) -> Geometry | None:
    """Of a tensor at an address of that alignment, modulo 16; None where it has no bytes.

    block_size: of caches that are paged and have no dimension for it; else 0.
    """
    if 0 in shape:
        return None
    lines = lines_of(shape, stride, dtype.itemsize, rank, cache_layout, by_head)
    if block_size > 0:
        lines = lines._replace(block_stride=block_size * lines.token_stride)
    unit = unit_of(alignment, *lines[:3], lines.line_bytes)
    width = lines.line_bytes // unit.size * unit.words
    strip = min(next_power_of_2(width), _STRIP_WORDS)
    rows = min(_TILE_WORDS // strip, _TILE_ROWS)
    block, token, line = (stride // unit.size for stride in lines[:3])
    tile = Tile(lines.num_lines, unit.words, width, strip, rows)
    parts = lines.num_lines * cdiv(width, strip)
    return Geometry(unit.dtype, unit.size, (block, token, line), tile, parts)
