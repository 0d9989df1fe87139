# mypy: allow-untyped-defs, allow-incomplete-defs
"""Moving the rows that survive: any number of tensors in one launch, whatever their elements."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adsc_kernels import fakes
from adsc_kernels.triton.launch import (
    Packed,
    cdiv,
    launch,
    next_power_of_2,
    row_map,
    unit_of,
)
from adsc_kernels.triton.segment import ROW_MAP, RowMap, source_rows


class Moves(NamedTuple):
    """Tensors whose rows move, as kernels take them."""

    xs: tuple[Any, ...]
    outs: tuple[Any, ...]
    strides: tuple[int, ...]  # units from one row of x to the next


class Tiles(NamedTuple):
    """The shape of each tensor and of its tiles. A tile's columns are words."""

    WORDS: tuple[int, ...]  # of a unit
    WIDTHS: tuple[int, ...]  # units of a row
    ROWS: tuple[int, ...]
    COLUMNS: tuple[int, ...]


@triton.jit
def tiles_of(num_tokens, i: tl.constexpr, TILES: tl.constexpr):
    """How many tiles tensor i has."""
    ACROSS: tl.constexpr = (
        TILES.WIDTHS[i] * TILES.WORDS[i] + TILES.COLUMNS[i] - 1
    ) // TILES.COLUMNS[i]
    return (tl.cast(num_tokens, tl.int64) + TILES.ROWS[i] - 1) // TILES.ROWS[i] * ACROSS


@triton.jit
def place_of_tile(tile, i: tl.constexpr, TILES: tl.constexpr):
    """The output rows of a tile, and its columns."""
    ACROSS: tl.constexpr = (
        TILES.WIDTHS[i] * TILES.WORDS[i] + TILES.COLUMNS[i] - 1
    ) // TILES.COLUMNS[i]
    row = tile // ACROSS * TILES.ROWS[i] + tl.arange(0, TILES.ROWS[i])
    column = (tile % ACROSS).to(tl.int32) * TILES.COLUMNS[i] + tl.arange(0, TILES.COLUMNS[i])
    return row, column


@triton.jit
def move_tile(moves, row, source, found, num_tokens, column, i: tl.constexpr, TILES: tl.constexpr):
    """Output rows `row` of tensor i, from the source rows; 0 for a row without a source."""
    WORDS: tl.constexpr = TILES.WORDS[i]
    SIZE: tl.constexpr = TILES.WIDTHS[i] * WORDS
    inside = column < SIZE
    moved = tl.load(
        moves.xs[i] + (source * moves.strides[i] * WORDS)[:, None] + column[None, :],
        mask=found[:, None] & inside[None, :],
        other=0,
    )
    place = moves.outs[i] + (row * SIZE)[:, None] + column[None, :]
    tl.store(place, moved, mask=(row < num_tokens)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=ROW_MAP, do_not_specialize_on_alignment=ROW_MAP)
def downsample_kernel(
    moves, rows, num_segments, steps, num_tokens, num_rows, BY_INDEX: tl.constexpr,
    TILES: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """One program moves one tile of one tensor. The tiles of one follow those of the one before."""
    row_map = RowMap(rows, num_segments, steps, num_tokens, num_rows, BY_INDEX)
    tile = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(len(TILES.WORDS)):
        tiles = tiles_of(num_tokens, i, TILES)
        if (tile >= 0) & (tile < tiles):
            row, column = place_of_tile(tile, i, TILES)
            source, found = source_rows(row_map, row, CHECK)
            move_tile(moves, row, source, found, num_tokens, column, i, TILES)
        tile -= tiles


_TILE_WORDS = 1024  # 8 words of 8 bytes for each of 128 threads: 4 accesses of 16 bytes
_TILE_ROWS = 128


def tile_of(words: int, most_rows: int = _TILE_ROWS) -> tuple[int, int]:
    """Rows and words across a tile, for rows of so many words."""
    columns = min(next_power_of_2(words), _TILE_WORDS)
    return min(_TILE_WORDS // columns, most_rows), columns


class Form(NamedTuple):
    """What the tiles of one tensor follow from."""

    shape: torch.Size  # of a row
    stride: int
    dtype: torch.dtype
    alignment: int  # of what is read, modulo 16
    out_alignment: int  # of what is written


class Shape:
    """What the moves of some tensors are compiled for. One object stands for what it was made of:
    it is a part of keys, and told from others by identity."""

    def __init__(self, forms: Iterable[Form], most_rows: int) -> None:
        dtypes, strides, tiles, parts = [], [], [], []
        for shape, stride, dtype, *alignments in forms:
            size = math.prod(shape) * dtype.itemsize
            unit = unit_of(*alignments, size, stride * dtype.itemsize)
            width = size // unit.size
            rows, columns = tile_of(width * unit.words, most_rows)
            dtypes.append(unit.dtype)
            strides.append(stride * dtype.itemsize // unit.size)
            tiles.append((unit.words, width, rows, columns))
            parts.append((rows, cdiv(width * unit.words, columns)))
        self.dtypes = dtypes  # of words
        self.strides = tuple(strides)
        self.tiles = Tiles(*zip(*tiles, strict=True))
        self.parts = parts  # the rows of a tile, and how many tiles lie across

    def programs(self, num_tokens: int) -> int:
        """How many move the tiles of so many rows."""
        return sum([cdiv(num_tokens, rows) * across for rows, across in self.parts])


_shape_of = functools.lru_cache(maxsize=1024)(Shape)


def moves_of(
    xs: Sequence[Tensor], outs: Sequence[Tensor], most_rows: int = _TILE_ROWS
) -> tuple[Packed, Tiles, int]:
    """How rows of xs become outs, in tiles of most_rows rows at most, and how many programs it
    takes: `Moves`. Tensors that have no bytes are left out."""
    if not outs or not all(map(Tensor.numel, outs)):
        pairs = [pair for pair in zip(xs, outs, strict=True) if pair[1].numel() > 0]
        if not pairs:
            return _NOTHING
        xs, outs = zip(*pairs, strict=True)
    sources, targets = [*map(Tensor.data_ptr, xs)], [*map(Tensor.data_ptr, outs)]
    forms = [
        (x.shape[1:], x.stride(0), x.dtype, source & 15, target & 15)
        for x, source, target in zip(xs, sources, targets, strict=True)
    ]
    shape = _shape_of(tuple(forms), most_rows)

    def typed() -> Moves:
        words = [tuple(map(triton.reinterpret, tensors, shape.dtypes)) for tensors in (xs, outs)]
        return Moves(words[0], words[1], shape.strides)

    value = (tuple(sources), tuple(targets), shape.strides)
    return Packed(shape, value, typed), shape.tiles, shape.programs(outs[0].shape[0])


_NOTHING = (Packed(None, ((), (), ()), lambda: Moves((), (), ())), Tiles((), (), (), ()), 0)


def downsample_many(
    xs: Sequence[Tensor], segments: Tensor | None, keep_indices: Tensor | None, num_tokens: int
) -> list[Tensor]:
    """See `adsc_kernels.ops.downsample_many`."""
    outs = [fakes.downsample(x, segments, keep_indices, num_tokens) for x in xs]
    moves, tiles, programs = moves_of(xs, outs)
    if programs > 0:
        rows = row_map(segments, keep_indices, num_tokens, xs[0].shape[0])
        launch(downsample_kernel, programs, xs[0].device, (moves, *rows, tiles))
    return outs


def downsample(
    x: Tensor, segments: Tensor | None, keep_indices: Tensor | None, num_tokens: int
) -> Tensor:
    """See `adsc_kernels.ops.downsample`."""
    return downsample_many([x], segments, keep_indices, num_tokens)[0]
