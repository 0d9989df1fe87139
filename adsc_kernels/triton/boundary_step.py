# mypy: allow-untyped-defs, allow-incomplete-defs
"""All that a boundary does, in one launch: the stage's metadata, the norm, and rows that move."""

import triton
import triton.language as tl
from torch import Tensor

from adsc_kernels import fakes
from adsc_kernels.triton.downsample import move_tile, moves_of
from adsc_kernels.triton.launch import BATCH_ARGUMENTS, RowMap, launch, row_layout, row_map
from adsc_kernels.triton.rebuild_metadata import (
    LAYOUT_ARGUMENTS,
    load_span,
    stage_layout,
    write_metadata,
)
from adsc_kernels.triton.downsample_add_rms_norm import add_rms_norm_row, check_norm, norm_of
from adsc_kernels.triton.segment import START, kept_index, source_rows

_SPANS = tl.constexpr(64)  # looked at together in search of the one that holds a row


_LAYOUT_ROWS = 8  # of a tile: each is compared with each of those spans


@triton.jit
def layout_sources(
    layout,
    boundary,
    row,
    num_tokens,
    num_rows,
    SPAN_COLUMNS: tl.constexpr,
    GRID: tl.constexpr,
    CHECK: tl.constexpr,
):
    """As source_rows, for a tensor of output rows, from the layout itself: no table is ready yet.

    Every program sums up the spans for itself. layout, boundary: as for metadata.load_span.
    """
    cu_seqlens, spans, num_sequences, num_spans, span_steps = layout
    keep, keep_of, columns, columns_of, pattern, blocks = boundary
    lane = tl.arange(0, _SPANS).to(tl.int64)
    begun = row * 0  # spans that begin at or before the row, and the tokens lost in them
    lost = row * 0
    lost_so_far = tl.cast(0, tl.int64)
    for first in range(0, num_spans, _SPANS):
        inside = first + lane < num_spans
        _, source, length, _, _, kept_rows, kept_columns = load_span(
            layout, boundary, first + lane, inside, SPAN_COLUMNS, GRID, CHECK
        )
        gone = length - kept_rows * kept_columns
        dst = source - (lost_so_far + tl.cumsum(gone, 0) - gone)
        before = inside[None, :] & (dst[None, :] <= row[:, None])
        begun += tl.sum(before.to(tl.int64), 1)
        lost += tl.sum(tl.where(before, gone[None, :], 0), 1)
        lost_so_far += tl.sum(gone, 0)

    some = begun > 0
    _, source, length, height, width, kept_rows, kept_columns = load_span(
        layout, boundary, begun - 1, some, SPAN_COLUMNS, GRID, CHECK
    )
    kept = kept_rows * kept_columns
    number = row - (source - (lost - (length - kept)))
    if GRID:
        across = tl.maximum(kept_columns, 1)
        index = kept_index(START, number // across, height, kept_rows) * width
        index += kept_index(START, number % across, width, kept_columns)
    else:
        index = kept_index(pattern, number, width, kept_columns)
    source = tl.where(some & (number < kept), source + index, row + lost)
    end = tl.load(cu_seqlens + num_sequences)
    found = (row < num_tokens) & (source < end)
    if CHECK:
        tl.device_assert((end <= num_rows) & (end >= 0), "cu_seqlens: past the rows of hidden")
        found = found & (source >= 0) & (source < num_rows)
    return source, found


@triton.jit(
    do_not_specialize=[*BATCH_ARGUMENTS, *LAYOUT_ARGUMENTS],
    do_not_specialize_on_alignment=[*BATCH_ARGUMENTS, *LAYOUT_ARGUMENTS],
)
def boundary_step_kernel(
    x,
    residual,
    weight,
    normed,
    residual_out,
    x_stride,
    residual_stride,
    xs,
    outs,
    strides,
    rows,
    num_segments,
    steps,
    num_tokens,
    num_rows,
    cu_seqlens,
    spans,
    num_sequences,
    num_spans,
    span_steps,
    keep,
    keep_of,
    columns,
    columns_of,
    pattern,
    blocks,
    stage,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BY_INDEX: tl.constexpr,
    BY_LAYOUT: tl.constexpr,
    NORM: tl.constexpr,
    SPAN_COLUMNS: tl.constexpr,
    GRID: tl.constexpr,
    LANES: tl.constexpr,
    CHECK: tl.constexpr,
):
    """BY_LAYOUT program 0 writes the metadata; NORM the next num_tokens make a row each; the others
    move tiles as in downsample_kernel.
    """
    layout = (cu_seqlens, spans, num_sequences, num_spans, span_steps)
    boundary = (keep, keep_of, columns, columns_of, pattern, blocks)
    tile = tl.program_id(0).to(tl.int64)
    if BY_LAYOUT:
        if tile == 0:
            write_metadata(layout, boundary, stage, SPAN_COLUMNS, GRID, LANES, CHECK)
        tile -= 1
    if NORM:
        if (tile >= 0) & (tile < num_tokens):
            if BY_LAYOUT:
                source, found = layout_sources(
                    layout,
                    boundary,
                    tile + tl.arange(0, 1),
                    num_tokens,
                    num_rows,
                    SPAN_COLUMNS,
                    GRID,
                    CHECK,
                )
                source = tl.sum(source, 0)
                found = tl.sum(found.to(tl.int32), 0) > 0
            else:
                source, found = source_rows(
                    rows, num_segments, steps, tile, num_tokens, num_rows, BY_INDEX, CHECK
                )
            add_rms_norm_row(
                x + source * x_stride * UNIT,
                residual + source * residual_stride * UNIT,
                weight,
                normed + tile * (WIDTH * UNIT),
                residual_out + tile * (WIDTH * UNIT),
                found,
                WIDTH * UNIT,
                EPS,
                BLOCK,
            )
        tile -= num_tokens
    for i in tl.static_range(len(WORDS)):
        across = (WIDTHS[i] * WORDS[i] + TILE_COLUMNS[i] - 1) // TILE_COLUMNS[i]
        tiles = (tl.cast(num_tokens, tl.int64) + TILE_ROWS[i] - 1) // TILE_ROWS[i] * across
        if (tile >= 0) & (tile < tiles):
            row = tile // across * TILE_ROWS[i] + tl.arange(0, TILE_ROWS[i])
            column = (tile % across).to(tl.int32) * TILE_COLUMNS[i] + tl.arange(0, TILE_COLUMNS[i])
            if BY_LAYOUT:
                source, found = layout_sources(
                    layout, boundary, row, num_tokens, num_rows, SPAN_COLUMNS, GRID, CHECK
                )
            else:
                source, found = source_rows(
                    rows, num_segments, steps, row, num_tokens, num_rows, BY_INDEX, CHECK
                )
            wanted = row < num_tokens
            move_tile(
                xs[i], outs[i], strides[i], row, source, found, wanted, column, WORDS[i], WIDTHS[i]
            )
        tile -= tiles


def boundary_step(*arguments) -> list[Tensor]:
    """See `adsc_kernels.ops.boundary_step`."""
    return write_boundary_step(None, *arguments)


def write_boundary_step(
    outs: list[Tensor] | None,
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
) -> list[Tensor]:
    """The same into outs, which are like those of `fakes.boundary_step`; None: into new ones."""
    if (residual is None) != (weight is None):
        raise ValueError("residual, weight: expected both or neither, got one")
    if (cu_seqlens is None) != (spans is None):
        raise ValueError("cu_seqlens, spans: expected both or neither, got one")
    device = hidden.device
    for name, x in (("hidden", hidden), ("residual", residual), *(("others", x) for x in others)):
        if x is None:
            continue
        layout_of_rows = row_layout(x, name)
        if x.device != device or layout_of_rows.num_rows != hidden.shape[0]:
            raise ValueError(
                f"{name}: expected {hidden.shape[0]} rows on {device}, got "
                f"{layout_of_rows.num_rows} on {x.device}"
            )

    if cu_seqlens is not None and spans is not None:
        if segments is not None or keep_indices is not None:
            raise ValueError("segments, keep_indices: expected neither with cu_seqlens")
        if cu_seqlens.device != device:
            raise ValueError(
                f"cu_seqlens: expected the device of hidden, {device}, got {cu_seqlens.device}"
            )
        if num_tokens < 0:
            raise ValueError(f"num_tokens: expected at least 0, got {num_tokens}")
        layout = stage_layout(cu_seqlens, spans, keep, pattern, max_height)
        movement = RowMap((cu_seqlens, 0, 0, num_tokens, hidden.shape[0]), False)
        by_layout, constants = True, (*layout.constants[:2], 128)
        described = layout.arguments
    else:
        movement = row_map(segments, keep_indices, num_tokens, hidden.shape[0], device)
        rows = movement.arguments[0]  # in the place of pointers that are not used
        by_layout, constants = False, (3, False, 128)
        described = (rows, rows, *(0,) * 9)
    if residual is not None and weight is not None:
        check_norm(hidden, residual, weight)
    if outs is None:
        outs = fakes.boundary_step(
            hidden, residual, weight, eps, others, segments, keep_indices, cu_seqlens, spans, keep,
            pattern, max_height, num_tokens,
        )  # fmt: skip

    moved = [hidden, *others] if residual is None else others
    first = 0 if residual is None else 2
    last = first + len(moved)
    stage = tuple(outs[last:]) or (rows,) * 6
    normalize, warps = False, 4
    pointers: tuple = (*(movement.arguments[0],) * 5, 0, 0)
    norm_constants: tuple = (1, 1, 1)
    if residual is not None and weight is not None:
        norm = norm_of(hidden, residual, weight, *outs[:2])
        normalize, pointers, norm_constants = outs[0].numel() > 0, norm.pointers, norm.constants
        warps = norm.warps
    moves = moves_of(moved, outs[first:last], *((_LAYOUT_ROWS,) if by_layout else ()))

    programs = by_layout + normalize * num_tokens + moves.programs
    if programs > 0:
        shapes = moves.shapes
        unused = ((hidden,), (hidden,), (0,))
        moving = moves.pointers if moves.programs > 0 else unused
        arguments = (*pointers, *moving, *movement.arguments, *described, stage)
        flags = (movement.by_index, by_layout, normalize, *constants)
        launch(
            boundary_step_kernel,
            programs,
            device,
            (*arguments, *norm_constants, eps, *shapes, *flags),
            num_warps=warps,
            **({"maxnreg": 128} if by_layout else {}),  # as for rebuild_metadata
        )
    return outs
