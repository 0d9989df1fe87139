# mypy: allow-untyped-defs, allow-incomplete-defs
"""Moving the rows that survive: any number of tensors in one launch, whatever their elements."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from adsc_kernels import fakes
from adsc_kernels.triton.launch import Pointer, launch, row_layout, row_map, unit_of
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
    columns = min(triton.next_power_of_2(words), _TILE_WORDS)
    return min(_TILE_WORDS // columns, most_rows), columns


def moves_of(
    xs: Sequence[Tensor], outs: Sequence[Tensor], most_rows: int = _TILE_ROWS
) -> tuple[Moves, Tiles, int]:
    """How rows of xs become outs, in tiles of most_rows rows at most, and how many programs it
    takes. Tensors that have no bytes are left out."""
    moves, tiles = [], []
    programs = 0
    for x, out in zip(xs, outs, strict=True):
        if out.numel() == 0:
            continue
        size, stride = row_layout(x)
        unit = unit_of(x.data_ptr(), out.data_ptr(), size, stride)
        width = size // unit.size
        rows, columns = tile_of(width * unit.words, most_rows)
        moves.append((Pointer(x, unit.dtype), Pointer(out, unit.dtype), stride // unit.size))
        tiles.append((unit.words, width, rows, columns))
        programs += triton.cdiv(len(out), rows) * triton.cdiv(width * unit.words, columns)
    if programs == 0:
        return Moves((), (), ()), Tiles((), (), (), ()), 0
    return Moves(*zip(*moves, strict=True)), Tiles(*zip(*tiles, strict=True)), programs


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
