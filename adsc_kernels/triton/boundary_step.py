# mypy: allow-untyped-defs, allow-incomplete-defs
"""All that a boundary does, in one launch: the stage's metadata, the norm, and rows that move."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from adsc_kernels import fakes
from adsc_kernels.triton.downsample import move_tile, moves_of, place_of_tile, tiles_of
from adsc_kernels.triton.downsample_add_rms_norm import add_rms_norm_row, norm_of
from adsc_kernels.triton.launch import launch, row_map
from adsc_kernels.triton.rebuild_metadata import (
    LAYOUT,
    BatchLayout,
    Boundary,
    Stage,
    layout_of,
    load_span,
    write_metadata,
)
from adsc_kernels.triton.segment import ROW_MAP, START, RowMap, kept_index, source_rows

_SPANS = tl.constexpr(64)  # looked at together in search of the one that holds a row
_LAYOUT_ROWS = 8  # of a tile: each is compared with each of those spans


@triton.jit
def layout_sources(layout, boundary, row_map, row, SHAPE: tl.constexpr, CHECK: tl.constexpr):
    """As source_rows, for a tensor of output rows, from the layout itself: no table is ready yet.

    Every program sums up the spans for itself.
    """
    lane = tl.arange(0, _SPANS).to(tl.int64)
    begun = row * 0  # spans that begin at or before the row, and the tokens lost in them
    lost = row * 0
    lost_so_far = tl.cast(0, tl.int64)
    for first in range(0, layout.num_spans, _SPANS):
        inside = first + lane < layout.num_spans
        _, source, length, _, _, kept_rows, kept_columns = load_span(
            layout, boundary, first + lane, inside, SHAPE, CHECK
        )
        gone = length - kept_rows * kept_columns
        dst = source - (lost_so_far + tl.cumsum(gone, 0) - gone)
        before = inside[None, :] & (dst[None, :] <= row[:, None])
        begun += tl.sum(before.to(tl.int64), 1)
        lost += tl.sum(tl.where(before, gone[None, :], 0), 1)
        lost_so_far += tl.sum(gone, 0)

    some = begun > 0
    _, source, length, height, width, kept_rows, kept_columns = load_span(
        layout, boundary, begun - 1, some, SHAPE, CHECK
    )
    kept = kept_rows * kept_columns
    number = row - (source - (lost - (length - kept)))
    if SHAPE.GRID:
        across = tl.maximum(kept_columns, 1)
        index = kept_index(START, number // across, height, kept_rows) * width
        index += kept_index(START, number % across, width, kept_columns)
    else:
        index = kept_index(boundary.pattern, number, width, kept_columns)
    source = tl.where(some & (number < kept), source + index, row + lost)
    end = tl.load(layout.cu_seqlens + layout.num_sequences)
    found = (row < row_map.num_tokens) & (source < end)
    if CHECK:
        ok = (end <= row_map.num_rows) & (end >= 0)
        tl.device_assert(ok, "cu_seqlens: past the rows of hidden")
        found = found & (source >= 0) & (source < row_map.num_rows)
    return source, found


@triton.jit
def source_of_row(layout, boundary, row_map, row, SHAPE: tl.constexpr, CHECK: tl.constexpr):
    """As source_rows, for one row. SHAPE: of the layout; None where there is none."""
    if SHAPE is not None:
        row = row + tl.arange(0, 1)
        source, found = layout_sources(layout, boundary, row_map, row, SHAPE, CHECK)
        source = tl.sum(source, 0)
        found = tl.sum(found.to(tl.int32), 0) > 0
    else:
        source, found = source_rows(row_map, row, CHECK)
    return source, found


@triton.jit(
    do_not_specialize=[*ROW_MAP, *LAYOUT], do_not_specialize_on_alignment=[*ROW_MAP, *LAYOUT]
)
def boundary_step_kernel(
    norm, moves, stage,
    rows, num_segments, steps, num_tokens, num_rows, BY_INDEX: tl.constexpr,
    cu_seqlens, spans, num_sequences, num_spans, span_steps,
    keep, keep_of, columns, columns_of, pattern, blocks,
    NORM: tl.constexpr, TILES: tl.constexpr, SHAPE: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """With a layout program 0 writes the metadata; with a norm the next num_tokens make a row each;
    the others move tiles as in downsample_kernel.

    SHAPE, NORM: of the layout and of the norm; None where there is none.
    """
    row_map = RowMap(rows, num_segments, steps, num_tokens, num_rows, BY_INDEX)
    layout = BatchLayout(cu_seqlens, spans, num_sequences, num_spans, span_steps)
    boundary = Boundary(keep, keep_of, columns, columns_of, pattern, blocks)
    tile = tl.program_id(0).to(tl.int64)
    if SHAPE is not None:
        if tile == 0:
            write_metadata(layout, boundary, stage, SHAPE, CHECK)
        tile -= 1
    if NORM is not None:
        if (tile >= 0) & (tile < num_tokens):
            source, found = source_of_row(layout, boundary, row_map, tile, SHAPE, CHECK)
            add_rms_norm_row(norm, tile, source, found, NORM)
        tile -= num_tokens
    for i in tl.static_range(len(TILES.WORDS)):
        tiles = tiles_of(num_tokens, i, TILES)
        if (tile >= 0) & (tile < tiles):
            row, column = place_of_tile(tile, i, TILES)
            if SHAPE is not None:
                source, found = layout_sources(layout, boundary, row_map, row, SHAPE, CHECK)
            else:
                source, found = source_rows(row_map, row, CHECK)
            move_tile(moves, row, source, found, num_tokens, column, i, TILES)
        tile -= tiles


def boundary_step(*arguments) -> list[Tensor]:
    """See `adsc_kernels.ops.boundary_step`; arguments: those of its schema."""
    outs = fakes.boundary_step(*arguments)
    write_boundary_step(outs, *arguments)
    return outs


def write_boundary_step(
    outs: list[Tensor],
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    others: list[Tensor],
    segments: Tensor | None,
    keep_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    spans: Tensor | None,
    keep: list[int],
    pattern: str,
    max_height: int,
    num_tokens: int,
) -> None:
    """The same into outs, which are like those of `fakes.boundary_step`."""
    rows = row_map(segments, keep_indices, num_tokens, hidden.shape[0])
    layout: tuple[Any, ...] = (None, None, *(0,) * 9)
    stage = shape = norm = norm_shape = None
    options: dict[str, Any] = {"num_warps": 4}
    tile_rows = {}
    moved, first = [hidden, *others], 0
    if cu_seqlens is not None and spans is not None:
        layout, shape = layout_of(cu_seqlens, spans, keep, pattern, max_height)
        shape = shape._replace(LANES=128)
        stage = Stage(*outs[-6:])
        tile_rows = {"most_rows": _LAYOUT_ROWS}
        options["maxnreg"] = 128  # as for rebuild_metadata
    if residual is not None and weight is not None:
        moved, first = others, 2
        if outs[0].numel() > 0:
            norm, norm_shape, options["num_warps"] = norm_of(
                hidden, residual, weight, eps, *outs[:2]
            )
    moves, tiles, programs = moves_of(moved, outs[first : first + len(moved)], **tile_rows)
    programs += (shape is not None) + (norm is not None) * num_tokens
    if programs > 0:
        arguments = (norm, moves, stage, *rows, *layout, norm_shape, tiles, shape)
        launch(boundary_step_kernel, programs, hidden.device, arguments, **options)
