# mypy: allow-untyped-defs, allow-incomplete-defs
"""What one boundary makes of a batch's layout: one program, since all of it is a running sum."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adsc_kernels import fakes
from adsc_kernels.segment_table import PATTERN_CODES
from adsc_kernels.triton.launch import launch
from adsc_kernels.triton.segment import COLUMNS, START, kept_count, kept_index

# What describes a batch and a boundary, in the order in which kernels take it; the code is the same
# for all values. keep / keep_of is the share of a span that stays; of a grid that of its rows, with
# columns / columns_of for its columns. blocks: segments for each span.
LAYOUT_ARGUMENTS = [
    *("cu_seqlens", "spans", "num_sequences", "num_spans", "span_steps"),
    *("keep", "keep_of", "columns", "columns_of", "pattern", "blocks"),
]


@triton.jit
def load_span(
    layout, boundary, i, inside, SPAN_COLUMNS: tl.constexpr, GRID: tl.constexpr, CHECK: tl.constexpr
):
    """Span i: sequence, source row, length, height, width, and how many rows and columns stay.

    layout, boundary: LAYOUT_ARGUMENTS up to span_steps, and those from keep on. Without GRID a span
    is one row. All are 0 where not inside.
    """
    cu_seqlens, spans, num_sequences, num_spans, span_steps = layout
    keep, keep_of, columns, columns_of, pattern, blocks = boundary
    span = spans + tl.cast(i, tl.int64) * SPAN_COLUMNS
    sequence = tl.load(span, mask=inside, other=0)
    start = tl.load(span + 1, mask=inside, other=0)
    length = tl.load(span + 2, mask=inside, other=0).to(tl.int64)
    if CHECK:
        known = (sequence >= 0) & (sequence < num_sequences)
        tl.device_assert(known | ~inside, "spans: a sequence outside of the batch")
        tl.device_assert((start >= 0) & (length >= 0) | ~inside, "spans: a negative value")
        inside = inside & known
    source = tl.load(cu_seqlens + sequence, mask=inside, other=0).to(tl.int64) + start
    if GRID:
        height = tl.load(span + 3, mask=inside, other=0).to(tl.int64)
        width = tl.load(span + 4, mask=inside, other=0).to(tl.int64)
        kept_rows = kept_count(height, keep, keep_of)
        kept_columns = kept_count(width, columns, columns_of)
        if CHECK:
            fits = (height >= 0) & (height * width == length) & (kept_rows <= blocks)
            tl.device_assert(fits | ~inside, "spans: height x width, or a height above max_height")
    else:
        height = tl.where(inside, tl.cast(1, tl.int64), 0)
        width = length
        kept_rows = height
        kept_columns = kept_count(length, keep, keep_of)
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
def spans_before(layout, sequence, SPAN_COLUMNS: tl.constexpr):
    """How many spans belong to sequences before this one."""
    cu_seqlens, spans, num_sequences, num_spans, span_steps = layout
    low = tl.cast(sequence * 0, tl.int64)
    high = low + num_spans
    for _ in range(span_steps):  # 2^span_steps > num_spans
        middle = (low + high) // 2
        unsure = low < high
        below = unsure & (tl.load(spans + middle * SPAN_COLUMNS, mask=unsure, other=0) < sequence)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def lost_before(
    spans, next_spans, i, inside, SPAN_COLUMNS: tl.constexpr, NEXT_COLUMNS: tl.constexpr
):
    """D_i, as the first loop of write_metadata left it."""
    some = inside & (i > 0)
    last = next_spans + (i - 1) * NEXT_COLUMNS
    before = tl.load(last + 1, mask=some, other=0).to(tl.int64)
    length = tl.load(spans + (i - 1) * SPAN_COLUMNS + 2, mask=some, other=0)
    return before + length - tl.load(last + 2, mask=some, other=0)


@triton.jit
def write_metadata(
    layout,
    boundary,
    stage,
    SPAN_COLUMNS: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECK: tl.constexpr,
):
    """All six tensors of the stage. layout, boundary: as for load_span.

    With D_i the tokens that are lost in the spans before span i, source row s between spans i - 1
    and i goes to row s - D_i. Before the segments of span i come i times (1 + blocks), and one for
    each sequence before its own: the text at its end.
    """
    cu_seqlens, spans, num_sequences, num_spans, span_steps = layout
    keep, keep_of, columns, columns_of, pattern, blocks = boundary
    next_cu_seqlens, next_spans, segments, seq_lens, num_tokens, max_seqlen = stage
    NEXT_COLUMNS: tl.constexpr = 5 if GRID else 3
    lane = tl.arange(0, BLOCK).to(tl.int64)

    # The spans, and the text before each. D_i is left where the new start of span i will be.
    lost_so_far = tl.cast(0, tl.int64)
    for first in range(0, num_spans, BLOCK):
        i = first + lane
        inside = i < num_spans
        sequence, source, length, height, width, kept_rows, kept_columns = load_span(
            layout, boundary, i, inside, SPAN_COLUMNS, GRID, CHECK
        )
        kept = kept_rows * kept_columns
        lost = length - kept
        before = lost_so_far + tl.cumsum(lost, 0) - lost
        lost_so_far += tl.sum(lost, 0)

        text = tl.load(cu_seqlens + sequence, mask=inside, other=0).to(tl.int64)
        last = spans + (i - 1) * SPAN_COLUMNS
        some = inside & (i > 0)
        owner = tl.load(last, mask=some, other=-1)
        follows = some & (owner == sequence)
        text += tl.load(last + 1, mask=follows, other=0)
        text += tl.load(last + 2, mask=follows, other=0)
        if CHECK:
            end = tl.load(cu_seqlens + sequence + 1, mask=inside, other=0)
            fits = (owner <= sequence) & (source >= text) & (source + length <= end)
            tl.device_assert(fits | ~inside, "spans: out of order, or past a sequence's end")

        slot = i * (1 + blocks) + sequence
        dst = source - before
        store_segment(
            segments, slot, text - before, text, source - text, source - text, START, inside
        )
        if GRID:
            for r in range(blocks):
                used = r < kept_rows
                row = kept_index(START, r, height, kept_rows)
                store_segment(
                    segments,
                    slot + 1 + r,
                    dst + tl.minimum(r, kept_rows) * kept_columns,
                    source + tl.where(used, row * width, length),
                    tl.where(used, width, 0),
                    tl.where(used, kept_columns, 0),
                    START,
                    inside,
                )
        else:
            store_segment(segments, slot + 1, dst, source, length, kept, pattern, inside)

        next_span = next_spans + i * NEXT_COLUMNS
        tl.store(next_span, sequence, mask=inside)
        tl.store(next_span + 1, before, mask=inside)
        tl.store(next_span + 2, kept, mask=inside)
        if GRID:
            tl.store(next_span + 3, kept_rows, mask=inside)
            tl.store(next_span + 4, kept_columns, mask=inside)
    tl.debug_barrier()  # what other threads have written is read below

    # The sequences, and the text at the end of each.
    longest = tl.cast(0, tl.int64)
    for first in range(0, num_sequences, BLOCK):
        b = first + lane
        inside = b < num_sequences
        begin = tl.load(cu_seqlens + b, mask=inside, other=0).to(tl.int64)
        end = tl.load(cu_seqlens + b + 1, mask=inside, other=0).to(tl.int64)
        if CHECK:
            fits = (begin <= end) & ((b > 0) | (begin == 0))
            tl.device_assert(fits | ~inside, "cu_seqlens: not rising from 0")
        i = spans_before(layout, b, SPAN_COLUMNS)
        after = spans_before(layout, b + 1, SPAN_COLUMNS)
        next_begin = begin - lost_before(spans, next_spans, i, inside, SPAN_COLUMNS, NEXT_COLUMNS)
        lost = lost_before(spans, next_spans, after, inside, SPAN_COLUMNS, NEXT_COLUMNS)
        some = inside & (i < after)
        last = spans + (after - 1) * SPAN_COLUMNS
        text = begin + tl.load(last + 1, mask=some, other=0) + tl.load(last + 2, mask=some, other=0)
        slot = after * (1 + blocks) + b
        store_segment(segments, slot, text - lost, text, end - text, end - text, START, inside)
        rows = tl.where(inside, end - lost - next_begin, 0)
        tl.store(next_cu_seqlens + b + 1, end - lost, mask=inside)
        tl.store(seq_lens + b, rows, mask=inside)
        longest = tl.maximum(longest, tl.max(rows, 0))
    tl.store(next_cu_seqlens, 0)
    tl.store(num_tokens, tl.load(cu_seqlens + num_sequences) - lost_so_far)
    tl.store(max_seqlen, longest)
    tl.debug_barrier()

    # Where the spans start in their sequences.
    for first in range(0, num_spans, BLOCK):
        i = first + lane
        inside = i < num_spans
        sequence = tl.load(spans + i * SPAN_COLUMNS, mask=inside, other=0)
        start = tl.load(spans + i * SPAN_COLUMNS + 1, mask=inside, other=0)
        lost = tl.load(cu_seqlens + sequence, mask=inside, other=0)
        lost -= tl.load(next_cu_seqlens + sequence, mask=inside, other=0)  # D of its first span
        place = next_spans + i * NEXT_COLUMNS + 1
        tl.store(place, start + lost - tl.load(place, mask=inside, other=0), mask=inside)


@triton.jit(do_not_specialize=LAYOUT_ARGUMENTS, do_not_specialize_on_alignment=LAYOUT_ARGUMENTS)
def rebuild_metadata_kernel(
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
    SPAN_COLUMNS: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECK: tl.constexpr,
):
    """One program."""
    layout = (cu_seqlens, spans, num_sequences, num_spans, span_steps)
    boundary = (keep, keep_of, columns, columns_of, pattern, blocks)
    write_metadata(layout, boundary, stage, SPAN_COLUMNS, GRID, BLOCK, CHECK)


class StageLayout(NamedTuple):
    """A batch and a boundary as kernels take them."""

    arguments: tuple[Any, ...]  # LAYOUT_ARGUMENTS
    constants: tuple[Any, ...]  # SPAN_COLUMNS, GRID, BLOCK
    warps: int


def stage_layout(
    cu_seqlens: Tensor, spans: Tensor, keep: list[int], pattern: str, max_height: int
) -> StageLayout:
    """Raises ValueError where they can't describe a batch and a boundary."""
    for name, tensor in (("cu_seqlens", cu_seqlens), ("spans", spans)):
        if tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous int32, got {tensor.dtype}, {tensor.stride()}"
            )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens: expected [B + 1], got shape {tuple(cu_seqlens.shape)}")
    if spans.dim() != 2 or spans.shape[1] not in (3, 5):
        raise ValueError(f"spans: expected [N, 3] or [N, 5], got shape {tuple(spans.shape)}")
    if spans.device != cu_seqlens.device:
        raise ValueError(
            f"spans: expected the device of cu_seqlens, {cu_seqlens.device}, got {spans.device}"
        )
    if pattern not in PATTERN_CODES:
        raise ValueError(f"pattern: expected start, center, linspace or grid, got {pattern}")
    grid = pattern == "grid"
    if len(keep) != (4 if grid else 2):
        raise ValueError(f"keep: expected {4 if grid else 2} integers, got {len(keep)}")
    for part, whole in zip(keep[::2], keep[1::2], strict=True):
        if not 0 <= part <= whole or not 0 < whole < 1 << 31:
            raise ValueError(f"keep: expected a fraction in [0, 1], got {part}/{whole}")
    blocks = 1
    if grid:
        if spans.shape[1] != 5:
            raise ValueError(f"spans: expected [N, 5] for the grid, got {tuple(spans.shape)}")
        if not 0 <= max_height < 1 << 31:
            raise ValueError(f"max_height: expected at least 0 for the grid, got {max_height}")
        blocks = -(-max_height * keep[0] // keep[1])

    num_sequences, num_spans = len(cu_seqlens) - 1, len(spans)
    block = 128 if max(num_sequences, num_spans) <= 128 else 512  # two versions of the code
    steps = num_spans.bit_length()
    shares = (*keep, *(0, 1))[:4]
    return StageLayout(
        (
            cu_seqlens,
            spans,
            num_sequences,
            num_spans,
            steps,
            *shares,
            PATTERN_CODES[pattern],
            blocks,
        ),
        (spans.shape[1], grid, block),
        4 if block == 128 else 8,
    )


def rebuild_metadata(
    cu_seqlens: Tensor, spans: Tensor, keep: list[int], pattern: str, max_height: int
) -> tuple[Tensor, ...]:
    """See `adsc_kernels.ops.rebuild_metadata`."""
    layout = stage_layout(cu_seqlens, spans, keep, pattern, max_height)
    stage = fakes.rebuild_metadata(cu_seqlens, spans, keep, pattern, max_height)
    arguments = (*layout.arguments, stage, *layout.constants)
    # With one program there is no reason to save registers, as ptxas else would, down to spilling.
    options = {"num_warps": layout.warps, "maxnreg": 128}
    launch(rebuild_metadata_kernel, 1, cu_seqlens.device, arguments, **options)
    return stage
