# mypy: allow-untyped-defs, allow-incomplete-defs
"""What one boundary makes of a batch's layout: one program, since all of it is a running sum."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from adsc_kernels import fakes
from adsc_kernels.segment_table import PATTERN_CODES
from adsc_kernels.triton.launch import launch
from adsc_kernels.triton.segment import COLUMNS, START, kept_count, kept_index


class BatchLayout(NamedTuple):
    """Whose rows are whose, and where the spans are.

    Kernels take these fields and those of Boundary one by one and put them together: Triton
    compiles anew for the values in a tuple, and not for those of an argument named in LAYOUT.
    """

    cu_seqlens: Any
    spans: Any
    num_sequences: Any
    num_spans: Any
    span_steps: Any  # 2^span_steps > num_spans


class Boundary(NamedTuple):
    """keep / keep_of is the share of a span that stays; of a grid that of its rows, with
    columns / columns_of for its columns."""

    keep: Any
    keep_of: Any
    columns: Any
    columns_of: Any
    pattern: Any
    blocks: Any  # segments for each span


LAYOUT = [*BatchLayout._fields, *Boundary._fields]


class LayoutShape(NamedTuple):
    """What kernels are compiled for."""

    SPAN_COLUMNS: int
    GRID: bool
    LANES: int  # spans or sequences looked at together


class Stage(NamedTuple):
    """The six tensors to be written, as `adsc_kernels.ops.Metadata` has them."""

    cu_seqlens: Any
    spans: Any
    segments: Any
    seq_lens: Any
    num_tokens: Any
    max_seqlen: Any


@triton.jit
def load_span(layout, boundary, i, inside, SHAPE: tl.constexpr, CHECK: tl.constexpr):
    """Span i: sequence, source row, length, height, width, and how many rows and columns stay.

    Without GRID a span is one row. All are 0 where not inside.
    """
    span = layout.spans + tl.cast(i, tl.int64) * SHAPE.SPAN_COLUMNS
    sequence = tl.load(span, mask=inside, other=0)
    start = tl.load(span + 1, mask=inside, other=0)
    length = tl.load(span + 2, mask=inside, other=0).to(tl.int64)
    if CHECK:
        known = (sequence >= 0) & (sequence < layout.num_sequences)
        tl.device_assert(known | ~inside, "spans: a sequence outside of the batch")
        tl.device_assert((start >= 0) & (length >= 0) | ~inside, "spans: a negative value")
        inside = inside & known
    source = tl.load(layout.cu_seqlens + sequence, mask=inside, other=0).to(tl.int64) + start
    if SHAPE.GRID:
        height = tl.load(span + 3, mask=inside, other=0).to(tl.int64)
        width = tl.load(span + 4, mask=inside, other=0).to(tl.int64)
        kept_rows = kept_count(height, boundary.keep, boundary.keep_of)
        kept_columns = kept_count(width, boundary.columns, boundary.columns_of)
        if CHECK:
            fits = (height >= 0) & (height * width == length) & (kept_rows <= boundary.blocks)
            tl.device_assert(fits | ~inside, "spans: height x width, or a height above max_height")
    else:
        height = tl.where(inside, tl.cast(1, tl.int64), 0)
        width = length
        kept_rows = height
        kept_columns = kept_count(length, boundary.keep, boundary.keep_of)
    return sequence, source, length, height, width, kept_rows, kept_columns


@triton.jit
def store_segment(segments, slot, dst, src, span, keep, pattern, inside):
    """Row `slot` of the table."""
    segment = segments + slot * COLUMNS
    tl.store(segment, dst, mask=inside)
    tl.store(segment + 1, src, mask=inside)
    tl.store(segment + 2, span, mask=inside)
    tl.store(segment + 3, keep, mask=inside)
    tl.store(segment + 4, 0, mask=inside)
    tl.store(segment + 5, pattern, mask=inside)


@triton.jit
def spans_before(layout, sequence, SHAPE: tl.constexpr):
    """How many spans belong to sequences before this one."""
    low = tl.cast(sequence * 0, tl.int64)
    high = low + layout.num_spans
    for _ in range(layout.span_steps):
        middle = (low + high) // 2
        unsure = low < high
        owner = tl.load(layout.spans + middle * SHAPE.SPAN_COLUMNS, mask=unsure, other=0)
        below = unsure & (owner < sequence)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def lost_before(layout, stage, i, inside, SHAPE: tl.constexpr):
    """D_i, as write_spans left it."""
    NEXT_COLUMNS: tl.constexpr = 5 if SHAPE.GRID else 3
    some = inside & (i > 0)
    last = stage.spans + (i - 1) * NEXT_COLUMNS
    before = tl.load(last + 1, mask=some, other=0).to(tl.int64)
    length = tl.load(layout.spans + (i - 1) * SHAPE.SPAN_COLUMNS + 2, mask=some, other=0)
    return before + length - tl.load(last + 2, mask=some, other=0)


@triton.jit
def end_of_span(layout, i, some, sequence, SHAPE: tl.constexpr):
    """Where span i ends within its sequence, and 0 where that is not `sequence`."""
    span = layout.spans + i * SHAPE.SPAN_COLUMNS
    owner = tl.load(span, mask=some, other=-1)
    own = some & (owner == sequence)
    end = tl.load(span + 1, mask=own, other=0).to(tl.int64)
    end += tl.load(span + 2, mask=own, other=0)
    return end, owner


@triton.jit
def store_rows_of_grid(
    segments, slot, dst, source, length, height, width, kept_rows, kept_columns, blocks, inside
):
    """A grid as `blocks` segments: one for each row that stays, and empty ones."""
    for r in range(blocks):
        used = r < kept_rows
        row = kept_index(START, r, height, kept_rows)
        store_segment(
            segments,
            slot + r,
            dst + tl.minimum(r, kept_rows) * kept_columns,
            source + tl.where(used, row * width, length),
            tl.where(used, width, 0),
            tl.where(used, kept_columns, 0),
            START,
            inside,
        )


@triton.jit
def write_spans(layout, boundary, stage, SHAPE: tl.constexpr, CHECK: tl.constexpr):
    """The spans, their segments, and those of the text before each; returns all tokens lost.

    D_i is left where the new start of span i will be.
    """
    NEXT_COLUMNS: tl.constexpr = 5 if SHAPE.GRID else 3
    lost_so_far = tl.cast(0, tl.int64)
    for first in range(0, layout.num_spans, SHAPE.LANES):
        i = first + tl.arange(0, SHAPE.LANES).to(tl.int64)
        inside = i < layout.num_spans
        sequence, source, length, height, width, kept_rows, kept_columns = load_span(
            layout, boundary, i, inside, SHAPE, CHECK
        )
        kept = kept_rows * kept_columns
        lost = length - kept
        before = lost_so_far + tl.cumsum(lost, 0) - lost
        lost_so_far += tl.sum(lost, 0)

        begin = tl.load(layout.cu_seqlens + sequence, mask=inside, other=0).to(tl.int64)
        text, owner = end_of_span(layout, i - 1, inside & (i > 0), sequence, SHAPE)
        text += begin
        if CHECK:
            end = tl.load(layout.cu_seqlens + sequence + 1, mask=inside, other=0)
            fits = (owner <= sequence) & (source >= text) & (source + length <= end)
            tl.device_assert(fits | ~inside, "spans: out of order, or past a sequence's end")

        slot = i * (1 + boundary.blocks) + sequence
        count = source - text
        store_segment(stage.segments, slot, text - before, text, count, count, START, inside)
        dst = source - before
        if SHAPE.GRID:
            store_rows_of_grid(
                stage.segments, slot + 1, dst, source, length, height, width, kept_rows,
                kept_columns, boundary.blocks, inside,
            )  # fmt: skip
        else:
            pattern = boundary.pattern
            store_segment(stage.segments, slot + 1, dst, source, length, kept, pattern, inside)

        next_span = stage.spans + i * NEXT_COLUMNS
        tl.store(next_span, sequence, mask=inside)
        tl.store(next_span + 1, before, mask=inside)
        tl.store(next_span + 2, kept, mask=inside)
        if SHAPE.GRID:
            tl.store(next_span + 3, kept_rows, mask=inside)
            tl.store(next_span + 4, kept_columns, mask=inside)
    return lost_so_far


@triton.jit
def write_sequences(layout, boundary, stage, lost_in_all, SHAPE: tl.constexpr, CHECK: tl.constexpr):
    """The sequences, and the text at the end of each."""
    longest = tl.cast(0, tl.int64)
    for first in range(0, layout.num_sequences, SHAPE.LANES):
        b = first + tl.arange(0, SHAPE.LANES).to(tl.int64)
        inside = b < layout.num_sequences
        begin = tl.load(layout.cu_seqlens + b, mask=inside, other=0).to(tl.int64)
        end = tl.load(layout.cu_seqlens + b + 1, mask=inside, other=0).to(tl.int64)
        if CHECK:
            fits = (begin <= end) & ((b > 0) | (begin == 0))
            tl.device_assert(fits | ~inside, "cu_seqlens: not rising from 0")
        i = spans_before(layout, b, SHAPE)
        after = spans_before(layout, b + 1, SHAPE)
        next_begin = begin - lost_before(layout, stage, i, inside, SHAPE)
        lost = lost_before(layout, stage, after, inside, SHAPE)
        text, _ = end_of_span(layout, after - 1, inside & (i < after), b, SHAPE)
        text += begin
        slot = after * (1 + boundary.blocks) + b
        count = end - text
        store_segment(stage.segments, slot, text - lost, text, count, count, START, inside)
        rows = tl.where(inside, end - lost - next_begin, 0)
        tl.store(stage.cu_seqlens + b + 1, end - lost, mask=inside)
        tl.store(stage.seq_lens + b, rows, mask=inside)
        longest = tl.maximum(longest, tl.max(rows, 0))
    tl.store(stage.cu_seqlens, 0)
    tl.store(stage.num_tokens, tl.load(layout.cu_seqlens + layout.num_sequences) - lost_in_all)
    tl.store(stage.max_seqlen, longest)


@triton.jit
def write_starts(layout, stage, SHAPE: tl.constexpr):
    """Where the spans start in their sequences."""
    NEXT_COLUMNS: tl.constexpr = 5 if SHAPE.GRID else 3
    for first in range(0, layout.num_spans, SHAPE.LANES):
        i = first + tl.arange(0, SHAPE.LANES).to(tl.int64)
        inside = i < layout.num_spans
        span = layout.spans + i * SHAPE.SPAN_COLUMNS
        sequence = tl.load(span, mask=inside, other=0)
        start = tl.load(span + 1, mask=inside, other=0)
        lost = tl.load(layout.cu_seqlens + sequence, mask=inside, other=0)
        lost -= tl.load(stage.cu_seqlens + sequence, mask=inside, other=0)  # D of its first span
        place = stage.spans + i * NEXT_COLUMNS + 1
        tl.store(place, start + lost - tl.load(place, mask=inside, other=0), mask=inside)


@triton.jit
def write_metadata(layout, boundary, stage, SHAPE: tl.constexpr, CHECK: tl.constexpr):
    """All six tensors of the stage.

    With D_i the tokens that are lost in the spans before span i, source row s between spans i - 1
    and i goes to row s - D_i. Before the segments of span i come i times (1 + blocks), and one for
    each sequence before its own: the text at its end.
    """
    lost = write_spans(layout, boundary, stage, SHAPE, CHECK)
    tl.debug_barrier()  # what other threads have written is read below
    write_sequences(layout, boundary, stage, lost, SHAPE, CHECK)
    tl.debug_barrier()
    write_starts(layout, stage, SHAPE)


@triton.jit(do_not_specialize=LAYOUT, do_not_specialize_on_alignment=LAYOUT)
def rebuild_metadata_kernel(
    stage,
    cu_seqlens, spans, num_sequences, num_spans, span_steps,
    keep, keep_of, columns, columns_of, pattern, blocks,
    SHAPE: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """One program."""
    layout = BatchLayout(cu_seqlens, spans, num_sequences, num_spans, span_steps)
    boundary = Boundary(keep, keep_of, columns, columns_of, pattern, blocks)
    write_metadata(layout, boundary, stage, SHAPE, CHECK)


def layout_of(
    cu_seqlens: Tensor, spans: Tensor, keep: list[int], pattern: str, max_height: int
) -> tuple[tuple[Any, ...], LayoutShape]:
    """The arguments named in LAYOUT, and what kernels are compiled for."""
    grid = pattern == "grid"
    blocks = -(-max_height * keep[0] // keep[1]) if grid else 1
    num_sequences, num_spans = cu_seqlens.shape[0] - 1, spans.shape[0]
    lanes = 128 if max(num_sequences, num_spans) <= 128 else 512  # two versions of the code
    layout = BatchLayout(cu_seqlens, spans, num_sequences, num_spans, num_spans.bit_length())
    boundary = Boundary(*[*(*keep, 0, 1)[:4], PATTERN_CODES[pattern], blocks])
    return (*layout, *boundary), LayoutShape(spans.shape[1], grid, lanes)


def rebuild_metadata(
    cu_seqlens: Tensor, spans: Tensor, keep: list[int], pattern: str, max_height: int
) -> tuple[Tensor, ...]:
    """See `adsc_kernels.ops.rebuild_metadata`."""
    layout, shape = layout_of(cu_seqlens, spans, keep, pattern, max_height)
    stage = Stage(*fakes.rebuild_metadata(cu_seqlens, spans, keep, pattern, max_height))
    launch(
        rebuild_metadata_kernel,
        1,
        cu_seqlens.device,
        (stage, *layout, shape),
        num_warps=4 if shape.LANES == 128 else 8,
        # With one program there is no reason to save registers, as ptxas else would, down to
        # spilling.
        maxnreg=128,
    )
    return tuple(stage)
