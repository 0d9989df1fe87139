# mypy: allow-untyped-defs, allow-incomplete-defs
"""Moving the rows that survive: any number of tensors in one launch, whatever their elements."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from adsc_kernels.triton.launch import (
    BATCH_ARGUMENTS,
    launch,
    pointer,
    row_layout,
    row_map,
    unit_of,
)
from adsc_kernels.triton.segment import source_rows


@triton.jit
def move_tile(
    x, out, stride, row, source, found, wanted, column, WORDS: tl.constexpr, WIDTH: tl.constexpr
):
    """Output rows `row` at words `column`, from the source rows; 0 for a row without a source.

    x, out: pointers to words. stride: units of WORDS words from one row of x to the next.
    WIDTH: units in a row.
    """
    inside = column < WIDTH * WORDS
    moved = tl.load(
        x + (source * stride * WORDS)[:, None] + column[None, :],
        mask=found[:, None] & inside[None, :],
        other=0,
    )
    place = out + (row * (WIDTH * WORDS))[:, None] + column[None, :]
    tl.store(place, moved, mask=wanted[:, None] & inside[None, :])


@triton.jit(do_not_specialize=BATCH_ARGUMENTS, do_not_specialize_on_alignment=BATCH_ARGUMENTS)
def downsample_kernel(
    xs,
    outs,
    strides,
    rows,
    num_segments,
    steps,
    num_tokens,
    num_rows,
    WORDS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BY_INDEX: tl.constexpr,
    CHECK: tl.constexpr,
):
    """One program moves one tile of one tensor. The tiles of one follow those of the one before.

    WORDS, WIDTHS: words in a unit and units in a row, of each tensor. TILE_ROWS, TILE_COLUMNS: the
    size of its tiles, in words.
    """
    tile = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(len(WORDS)):
        across = (WIDTHS[i] * WORDS[i] + TILE_COLUMNS[i] - 1) // TILE_COLUMNS[i]
        tiles = (tl.cast(num_tokens, tl.int64) + TILE_ROWS[i] - 1) // TILE_ROWS[i] * across
        if (tile >= 0) & (tile < tiles):
            row = tile // across * TILE_ROWS[i] + tl.arange(0, TILE_ROWS[i])
            column = (tile % across).to(tl.int32) * TILE_COLUMNS[i] + tl.arange(0, TILE_COLUMNS[i])
            source, found = source_rows(
                rows, num_segments, steps, row, num_tokens, num_rows, BY_INDEX, CHECK
            )
            wanted = row < num_tokens
            move_tile(
                xs[i], outs[i], strides[i], row, source, found, wanted, column, WORDS[i], WIDTHS[i]
            )
        tile -= tiles


_TILE_WORDS = 1024  # 8 words of 8 bytes for each of 128 threads: 4 accesses of 16 bytes
_TILE_ROWS = 128


def tile_of(words: int, most_rows: int = _TILE_ROWS) -> tuple[int, int]:
    """Rows and words across a tile, for rows of so many words."""
    columns = min(triton.next_power_of_2(words), _TILE_WORDS)
    return min(_TILE_WORDS // columns, most_rows), columns


class Moves(NamedTuple):
    """Tensors and their tiles as kernels take them. Without the tensors that have no bytes."""

    pointers: tuple[Any, ...]  # xs, outs, strides
    shapes: tuple[Any, ...]  # WORDS, WIDTHS, TILE_ROWS, TILE_COLUMNS
    programs: int


def moves_of(xs: Sequence[Tensor], outs: Sequence[Tensor], most_rows: int = _TILE_ROWS) -> Moves:
    """The tiles, of most_rows rows at most, in which rows of xs become outs."""
    addresses, shapes = [], []
    programs = 0
    for x, out in zip(xs, outs, strict=True):
        if out.numel() == 0:
            continue
        layout = row_layout(x, "xs")
        bytes_ = x.element_size()
        unit = unit_of(x.data_ptr(), out.data_ptr(), layout.size * bytes_, layout.stride * bytes_)
        width = layout.size * bytes_ // unit.size
        tile_rows, columns = tile_of(width * unit.words, most_rows)
        stride = layout.stride * bytes_ // unit.size
        addresses.append((pointer(x, unit.dtype), pointer(out, unit.dtype), stride))
        shapes.append((unit.words, width, tile_rows, columns))
        programs += triton.cdiv(len(out), tile_rows) * triton.cdiv(width * unit.words, columns)
    return Moves(
        tuple(zip(*addresses, strict=True)) or ((), (), ()),
        tuple(zip(*shapes, strict=True)) or ((), (), (), ()),
        programs,
    )


def downsample_many(
    xs: Sequence[Tensor], segments: Tensor | None, keep_indices: Tensor | None, num_tokens: int
) -> list[Tensor]:
    """See `adsc_kernels.ops.downsample_many`."""
    if not xs:
        raise ValueError("xs: expected at least one tensor, got none")
    device, num_rows = xs[0].device, xs[0].shape[0] if xs[0].dim() else 0
    for x in xs:
        row_layout(x, "xs")
        if x.shape[0] != num_rows:
            raise ValueError(
                f"xs: expected the same number of rows in all, got {num_rows} and {x.shape[0]}"
            )
        if x.device != device:
            raise ValueError(f"xs: expected one device, got {device} and {x.device}")
    movement = row_map(segments, keep_indices, num_tokens, num_rows, device)

    outs = [x.new_empty((num_tokens, *x.shape[1:])) for x in xs]
    moves = moves_of(xs, outs)
    if moves.programs > 0:
        arguments = (*moves.pointers, *movement.arguments, *moves.shapes, movement.by_index)
        launch(downsample_kernel, moves.programs, device, arguments)
    return outs


def downsample(
    x: Tensor, segments: Tensor | None, keep_indices: Tensor | None, num_tokens: int
) -> Tensor:
    """See `adsc_kernels.ops.downsample`."""
    return downsample_many([x], segments, keep_indices, num_tokens)[0]
