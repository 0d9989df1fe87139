# mypy: allow-untyped-defs, allow-incomplete-defs
"""Compacting a KV cache in place, the twin of csrc/compaction.h and csrc/cuda/compact.cu.

One launch for all tensors of one geometry, up to 64, and one for the lengths and the table; before
them, where something is to be checked, two that read everything and write no cache.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adsc_kernels.triton import launch
from adsc_kernels.triton.launch import pointer, start, unit_of
from adsc_kernels.triton.segment import segment_source

MAX_TENSORS = 64  # of a launch
_STRIP_WORDS = 64  # of a line, moved by one program: 512 bytes
_TILE_WORDS = 2048  # 16 words of 8 bytes for each of 128 threads
_TILE_ROWS = 128
_ENTRIES = 256  # of the lists of a batch or of a block table, for one program

# What a check knows of a block of the pool, in one word.
PINNED = tl.constexpr(1)
IN_TABLE = tl.constexpr(2)

PACKED = tl.constexpr(0)  # row r of sequence b is token seq_starts[b] + r
BATCHED = tl.constexpr(1)  # token r of block b
PAGED = tl.constexpr(2)  # token r % size of block table[b, r // size]

# What differs from batch to batch, or from cache to cache: the code is the same for all its values.
BATCH_ARGUMENTS = [
    "batch", "num_segments", "steps", "num_indices", "table_stride", "table_width", "num_blocks",
    "size",
]  # fmt: skip


@triton.jit
def sequence_rows(cu_kept, cu_rows, prefix_lens, seq_lens, b, inside, BY_INDEX: tl.constexpr):
    """Of sequence b: prefix, rows to choose from, how many stay, all; the number of the first that
    stays, and what segments and indices call the first to choose from."""
    first_kept = tl.load(cu_kept + b, mask=inside, other=0).to(tl.int64)
    kept = tl.load(cu_kept + b + 1, mask=inside, other=0).to(tl.int64) - first_kept
    prefix = first_kept * 0
    if prefix_lens is not None:
        prefix = tl.load(prefix_lens + b, mask=inside, other=0).to(tl.int64)
    first_row = first_kept * 0
    if cu_rows is not None:
        begin = tl.load(cu_rows + b, mask=inside, other=0).to(tl.int64)
        source = tl.load(cu_rows + b + 1, mask=inside, other=0).to(tl.int64) - begin
        if not BY_INDEX:
            first_row = begin
        total = prefix + source
        if seq_lens is not None:
            total = tl.load(seq_lens + b, mask=inside, other=0).to(tl.int64)
    else:
        total = tl.load(seq_lens + b, mask=inside, other=0).to(tl.int64)
        source = total - prefix
    return prefix, source, kept, total, first_kept, first_row


@triton.jit
def source_of(
    row, inside, prefix, source, kept, first_kept, first_row, rows, num_segments, steps, index,
    BY_INDEX: tl.constexpr,
):  # fmt: skip
    """The old row that each row of the new cache takes. index: where the head's indices begin."""
    number = row - prefix
    chosen = inside & (number >= 0) & (number < kept)
    number = tl.where(chosen, first_kept + number, 0)
    if BY_INDEX:
        taken = tl.load(rows + index + number, mask=chosen, other=0).to(tl.int64)
    else:
        taken, _ = segment_source(rows, num_segments, steps, number)
    behind = tl.where(row < prefix, row, row + source - kept)
    return tl.where(chosen, prefix + taken - first_row, behind)


@triton.jit
def move_at(
    position, inside, prefix, source, kept, total, first_kept, first_row, rows, num_segments, steps,
    index, size, EDIT_TABLE: tl.constexpr, BY_INDEX: tl.constexpr,
):  # fmt: skip
    """The old row that is taken at each position, and the one in whose place it is put, in an order
    in which a row is read before its place is: see csrc/compaction.h."""
    row = position
    new = position
    if EDIT_TABLE:
        first = position // size * size
        last = tl.minimum(first + size, total - source + kept) - 1
        ending = source_of(
            last, inside, prefix, source, kept, first_kept, first_row, rows, num_segments, steps,
            index, BY_INDEX,
        )  # fmt: skip
        beginning = source_of(
            first, inside, prefix, source, kept, first_kept, first_row, rows, num_segments, steps,
            index, BY_INDEX,
        )  # fmt: skip
        backwards = ending % size == last % size
        row = tl.where(backwards, first + (last - position), position)
        new = tl.where(backwards, ending, beginning) // size * size + (row - first)
    old = source_of(
        row, inside, prefix, source, kept, first_kept, first_row, rows, num_segments, steps, index,
        BY_INDEX,
    )  # fmt: skip
    return old, new


@triton.jit
def place_in_cache(row, inside, b, seq_starts, table, table_stride, size, PLACEMENT: tl.constexpr):
    """Block and token of an old row."""
    block = row * 0
    token = row
    if PLACEMENT == PACKED:
        token = tl.load(seq_starts + b).to(tl.int64) + row
    elif PLACEMENT == BATCHED:
        block = row * 0 + b
    else:
        page = row // size
        token = row - page * size
        block = tl.load(table + b * table_stride + page, mask=inside, other=0).to(tl.int64)
    return block, token


@triton.jit(do_not_specialize=[*BATCH_ARGUMENTS, "offsets", "layers"])
def compact_kernel(
    base,
    offsets,
    layers,
    block_stride,
    token_stride,
    line_stride,
    rows,
    num_segments,
    steps,
    num_indices,
    cu_kept,
    cu_rows,
    prefix_lens,
    seq_lens,
    seq_starts,
    table,
    table_stride,
    table_width,
    num_blocks,
    size,
    batch,
    LINES: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    INDEX_LAYERS: tl.constexpr,
    INDEX_HEADS: tl.constexpr,
    PLACEMENT: tl.constexpr,
    EDIT_TABLE: tl.constexpr,
    BY_INDEX: tl.constexpr,
):
    """One program moves one strip of columns of one line of all rows of one sequence in one tensor.

    base: words. offsets: units of WORDS words from base to each tensor; strides in units too.
    WIDTH: words in a line. STRIP: words of a strip.
    """
    STRIPS: tl.constexpr = (WIDTH + STRIP - 1) // STRIP
    program = tl.program_id(0)
    b = (program % batch).to(tl.int64)
    strip = program // batch % STRIPS
    line = program // batch // STRIPS % LINES
    number = program // batch // STRIPS // LINES
    offset = tl.cast(offsets[0], tl.int64)
    layer = tl.cast(layers[0], tl.int64)
    for i in tl.static_range(1, len(offsets)):
        offset = tl.where(number == i, tl.cast(offsets[i], tl.int64), offset)
        layer = tl.where(number == i, tl.cast(layers[i], tl.int64), layer)
    line = line.to(tl.int64)
    index = tl.cast(0, tl.int64)
    if INDEX_LAYERS > 1:
        index = layer
    index = index * INDEX_HEADS
    if INDEX_HEADS > 1:
        index += line
    index = index * num_indices

    prefix, source, kept, total, first_kept, first_row = sequence_rows(
        cu_kept, cu_rows, prefix_lens, seq_lens, b, True, BY_INDEX
    )
    end = total - source + kept
    if source == kept:
        end = prefix  # all stay: nothing moves
    column = strip * STRIP + tl.arange(0, STRIP)
    begin = prefix
    if EDIT_TABLE:
        begin = prefix // size * size  # whole pages
    for first in tl.range(begin, end, TILE_ROWS):
        position = first + tl.arange(0, TILE_ROWS)
        inside = position < end
        old, new = move_at(
            position, inside, prefix, source, kept, total, first_kept, first_row, rows,
            num_segments, steps, index, size, EDIT_TABLE, BY_INDEX,
        )  # fmt: skip
        moved = inside & (old != new)
        block, token = place_in_cache(
            old, moved, b, seq_starts, table, table_stride, size, PLACEMENT
        )
        to_block, to_token = place_in_cache(
            new, moved, b, seq_starts, table, table_stride, size, PLACEMENT
        )
        here = offset + line * line_stride
        source_unit = here + block * block_stride + token * token_stride
        target_unit = here + to_block * block_stride + to_token * token_stride
        mask = moved[:, None] & (column < WIDTH)[None, :]
        values = tl.load(base + (source_unit * WORDS)[:, None] + column[None, :], mask=mask)
        # Safe in place for the reason given at store_tile in csrc/cuda/compact.cuh: what lies at a
        # place is taken in an earlier tile or in this one, all of a tile is read before any of it
        # is written, and nobody else touches this strip.
        tl.debug_barrier()
        tl.store(base + (target_unit * WORDS)[:, None] + column[None, :], values, mask=mask)


@triton.jit(do_not_specialize=BATCH_ARGUMENTS)
def outputs_kernel(
    out_lens,
    out_slots,
    out_last,
    out_indptr,
    out_table,
    rows,
    num_segments,
    steps,
    num_indices,
    cu_kept,
    cu_rows,
    prefix_lens,
    seq_lens,
    seq_starts,
    table,
    table_stride,
    table_width,
    num_blocks,
    size,
    batch,
    ENTRIES: tl.constexpr,
    PLACEMENT: tl.constexpr,
    EDIT_TABLE: tl.constexpr,
    BY_INDEX: tl.constexpr,
):
    """Program 0 writes lengths, slots and the running sum of pages, the others the new table."""
    program = tl.program_id(0)
    if program == 0:
        before = tl.cast(0, tl.int64)
        if PLACEMENT == PAGED:
            tl.store(out_indptr, 0)
        for first in tl.range(0, batch, ENTRIES):
            b = first + tl.arange(0, ENTRIES).to(tl.int64)
            inside = b < batch
            prefix, source, kept, total, first_kept, first_row = sequence_rows(
                cu_kept, cu_rows, prefix_lens, seq_lens, b, inside, BY_INDEX
            )
            length = total - source + kept
            tl.store(out_lens + b, length.to(tl.int32), mask=inside)
            if PLACEMENT == PACKED:
                slot = tl.load(seq_starts + b, mask=inside, other=0).to(tl.int64) + length
                end = tl.load(seq_starts + b + 1, mask=inside, other=0).to(tl.int64)
                slot = tl.where(slot < end, slot, -1)
            elif PLACEMENT == BATCHED:
                slot = tl.where(length < size, b * size + length, -1)
            else:
                pages = (length + size - 1) // size
                tl.store(out_indptr + 1 + b, (before + tl.cumsum(pages, 0)).to(tl.int32), inside)
                before += tl.sum(pages, 0)
                rest = length % size
                last = tl.where((length > 0) & (rest == 0), size, rest)
                tl.store(out_last + b, last.to(tl.int32), mask=inside)
                partial = inside & (rest > 0)
                page = (pages - 1) * size
                _, home = move_at(
                    page, partial, prefix, source, kept, total, first_kept, first_row, rows,
                    num_segments, steps, 0, size, EDIT_TABLE, BY_INDEX,
                )  # fmt: skip
                block, _ = place_in_cache(
                    home, partial, b, seq_starts, table, table_stride, size, PLACEMENT
                )
                slot = tl.where(partial, block * size + rest, -1)
            tl.store(out_slots + b, slot, mask=inside)
    elif EDIT_TABLE:
        entry = (program - 1).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
        inside = entry < batch * table_width
        b = tl.where(inside, entry // table_width, 0)
        page = (entry - b * table_width) * size
        prefix, source, kept, total, first_kept, first_row = sequence_rows(
            cu_kept, cu_rows, prefix_lens, seq_lens, b, inside, BY_INDEX
        )
        used = inside & (page < total - source + kept)
        _, home = move_at(
            page, used, prefix, source, kept, total, first_kept, first_row, rows, num_segments,
            steps, 0, size, EDIT_TABLE, BY_INDEX,
        )  # fmt: skip
        block, _ = place_in_cache(home, used, b, seq_starts, table, table_stride, size, PLACEMENT)
        tl.store(out_table + entry, tl.where(used, block, -1), mask=inside)


@triton.jit(do_not_specialize=["count", "num_blocks"])
def pin_kernel(state, pinned, count, num_blocks, ENTRIES: tl.constexpr):
    """Marks the blocks that may not be written; those outside of the pool are nobody's."""
    i = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    block = tl.load(pinned + i, mask=i < count, other=-1).to(tl.int64)
    tl.store(state + block, PINNED, mask=(block >= 0) & (block < num_blocks))


@triton.jit(do_not_specialize=BATCH_ARGUMENTS)
def check_kernel(
    state,
    rows,
    num_segments,
    steps,
    num_indices,
    cu_kept,
    cu_rows,
    prefix_lens,
    seq_lens,
    seq_starts,
    table,
    table_stride,
    table_width,
    num_blocks,
    size,
    batch,
    ENTRIES: tl.constexpr,
    SELECTIONS: tl.constexpr,
    PLACEMENT: tl.constexpr,
    EDIT_TABLE: tl.constexpr,
    BY_INDEX: tl.constexpr,
):
    """One program looks at all that one sequence's moves depend on, before anything is written.

    state: of every block of a paged cache. SELECTIONS: of rows, by layer and head.
    """
    b = tl.program_id(0).to(tl.int64)
    prefix, source, kept, total, first_kept, first_row = sequence_rows(
        cu_kept, cu_rows, prefix_lens, seq_lens, b, True, BY_INDEX
    )
    ok = (kept >= 0) & (kept <= source) & (first_kept >= 0)
    tl.device_assert(ok, "cu_kept: boundaries that don't rise, or more than there are to keep")
    if cu_rows is not None:
        ok = (tl.load(cu_rows + b) >= 0) & (source >= 0)
        tl.device_assert(ok, "cu_rows: boundaries that don't rise from 0")
    tl.device_assert(prefix >= 0, "prefix_lens: a negative length")
    room = tl.cast(size, tl.int64)
    if PLACEMENT == PACKED:
        begin = tl.load(seq_starts + b).to(tl.int64)
        end = tl.load(seq_starts + b + 1).to(tl.int64)
        ok = (begin >= 0) & (end >= begin) & (end <= size)
        tl.device_assert(ok, "seq_starts: boundaries that don't rise, or past the cache")
        room = end - begin
    elif PLACEMENT == PAGED:
        room = room * table_width
    ok = (total >= prefix + source) & (total <= room)
    tl.device_assert(ok, "seq_lens: less than prefix and rows, or more than there is room for")
    if BY_INDEX:
        ok = tl.load(cu_kept + batch) <= num_indices
        tl.device_assert(ok, "keep_indices: fewer than cu_kept says")
    tl.debug_barrier()  # nothing is looked up by what is wrong
    if PLACEMENT == PAGED:
        pages = (total + size - 1) // size
        for first in tl.range(0, pages, ENTRIES):
            page = first + tl.arange(0, ENTRIES)
            block = tl.load(table + b * table_stride + page, mask=page < pages, other=0)
            block = block.to(tl.int64)
            inside = (block >= 0) & (block < num_blocks)
            tl.device_assert(inside, "block_table: a block outside of the pool")
            before = tl.atomic_or(state + block, IN_TABLE, mask=(page < pages) & inside)
            once = (before != IN_TABLE) | (page >= pages)
            tl.device_assert(once, "block_table: a block twice that isn't in pinned")
    for selection in range(SELECTIONS):
        index = selection * num_indices
        for first in tl.range(0, kept, ENTRIES):
            row = prefix + first + tl.arange(0, ENTRIES)
            inside = row < prefix + kept
            old = source_of(
                row, inside, prefix, source, kept, first_kept, first_row, rows, num_segments,
                steps, index, BY_INDEX,
            )  # fmt: skip
            behind = inside & (row > prefix)
            before = source_of(
                row - 1, behind, prefix, source, kept, first_kept, first_row, rows, num_segments,
                steps, index, BY_INDEX,
            )  # fmt: skip
            before = tl.where(behind, before, prefix - 1)
            rising = (old > before) & (old < prefix + source) | ~inside
            tl.device_assert(rising, "segments, keep_indices: rows that don't rise in the sequence")
    tl.debug_barrier()
    if PLACEMENT == PAGED:
        length = total - source + kept
        pages = (length + size - 1) // size
        pages = tl.where(source == kept, 0, pages)  # all stay: nothing moves
        for selection in range(SELECTIONS):
            index = selection * num_indices
            for first in tl.range(0, pages, ENTRIES):
                page = first + tl.arange(0, ENTRIES)
                inside = page < pages
                # If the first and the last row of a page are in their places, all are.
                old, new = move_at(
                    page * size, inside, prefix, source, kept, total, first_kept, first_row, rows,
                    num_segments, steps, index, size, EDIT_TABLE, BY_INDEX,
                )  # fmt: skip
                old_last, new_last = move_at(
                    tl.minimum((page + 1) * size, length) - 1, inside, prefix, source, kept, total,
                    first_kept, first_row, rows, num_segments, steps, index, size, EDIT_TABLE,
                    BY_INDEX,
                )  # fmt: skip
                block, _ = place_in_cache(
                    new, inside, b, seq_starts, table, table_stride, size, PLACEMENT
                )
                is_pinned = (tl.atomic_or(state + block, 0, mask=inside) & PINNED) != 0
                written = inside & ((old != new) | (old_last != new_last))
                tl.device_assert(~(is_pinned & written), "pinned: a block that a move would write")


# ---- Launchers ----


class Lines(NamedTuple):
    """A tensor as lines of bytes, one for each head or one for all; strides in bytes."""

    block_stride: int
    token_stride: int
    line_stride: int
    num_lines: int
    line_bytes: int


def lines_of(x: Tensor, rank: int, layout: str, by_head: bool) -> Lines:
    """rank: that of the caches. Scales may lack the last dimension, or that and the heads."""
    width = x.element_size()
    shape = list(x.shape)
    strides = [stride * width for stride in x.stride()]
    if rank == 3:
        shape, strides = [1, *shape], [0, *strides]
    if x.dim() == rank - 2:
        shape, strides = [*shape, 1], [*strides, 0]
    elif layout == "HND":
        shape[1:3], strides[1:3] = shape[2:0:-1], strides[2:0:-1]
    if x.dim() < rank:
        shape, strides = [*shape, 1], [*strides, width]
    heads, line_bytes = shape[2], shape[3] * width
    if not by_head and (heads == 1 or strides[2] == line_bytes):
        return Lines(strides[0], strides[1], 0, 1, heads * line_bytes)
    return Lines(strides[0], strides[1], strides[2], heads, line_bytes)


class Movement(NamedTuple):
    """The arguments that all kernels take, and what they are compiled for."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]


def _move(
    caches: list[Tensor],
    num_layers: int,
    layout: str,
    movement: Movement,
    block_size: int | None,
    index_shape: tuple[int, int],
) -> None:
    rank, device, batch = caches[0].dim(), caches[0].device, movement.arguments[-1]
    by_head = index_shape[1] > 1
    groups: dict[Any, list[tuple[Tensor, int]]] = {}
    for i, x in enumerate(caches):
        if x.numel():
            lines = lines_of(x, rank, layout, by_head)
            if rank == 3 and block_size is not None:  # blocks of slots
                lines = lines._replace(block_stride=block_size * lines.token_stride)
            unit = unit_of(x.data_ptr(), *lines[:3], lines.line_bytes)
            groups.setdefault((lines, unit), []).append((x, i % num_layers))
    for (lines, unit), members in groups.items():
        width = lines.line_bytes // unit.size * unit.words
        strip = min(triton.next_power_of_2(width), _STRIP_WORDS)
        for first in range(0, len(members), MAX_TENSORS):
            some = members[first : first + MAX_TENSORS]
            base = some[0][0]
            offsets = [(x.data_ptr() - base.data_ptr()) // unit.size for x, _ in some]
            layers = [layer for _, layer in some]
            fill = [0] * (-len(some) % 8)  # a few sizes of tuples, so that few kernels are compiled
            start(
                compact_kernel,
                len(some) * lines.num_lines * triton.cdiv(width, strip) * batch,
                device,
                (
                    pointer(base, unit.dtype),
                    tuple(offsets + fill),
                    tuple(layers + fill),
                    *(stride // unit.size for stride in lines[:3]),
                    *movement.arguments,
                ),
                LINES=lines.num_lines,
                WORDS=unit.words,
                WIDTH=width,
                STRIP=strip,
                TILE_ROWS=min(_TILE_WORDS // strip, _TILE_ROWS),
                INDEX_LAYERS=index_shape[0],
                INDEX_HEADS=index_shape[1],
                **movement.options,
            )


def _movement(
    caches: list[Tensor],
    segments: Tensor | None,
    keep_indices: Tensor | None,
    cu_kept: Tensor,
    cu_rows: Tensor | None,
    prefix_lens: Tensor | None,
    seq_lens: Tensor | None,
    seq_starts: Tensor | None,
    table: Tensor | None,
    num_blocks: int,
    size: int,
    placement: int,
    edit_table: bool,
) -> Movement:
    rows = segments if keep_indices is None else keep_indices
    count = 0 if segments is None else len(segments)
    # Without segments no row of the middle stays, and none may be looked up.
    by_index = count == 0
    return Movement(
        (
            rows,
            count,
            max(count - 1, 0).bit_length(),
            0 if keep_indices is None else keep_indices.shape[-1],
            cu_kept,
            cu_rows,
            prefix_lens,
            seq_lens,
            seq_starts,
            table,
            0 if table is None else table.stride(0),
            0 if table is None else table.shape[1],
            num_blocks,
            size,
            cu_kept.shape[0] - 1,
        ),
        {"PLACEMENT": placement, "EDIT_TABLE": edit_table, "BY_INDEX": by_index},
    )


def _check(
    movement: Movement, device: torch.device, index_shape: tuple[int, int], pinned: Tensor | None
) -> None:
    """Stops the program with a message where the lists or the table lead outside, rows don't rise,
    two pages share a block that isn't pinned, or a move would write a pinned one."""
    *_, num_blocks, _, batch = movement.arguments
    state = None
    if movement.options["PLACEMENT"] == PAGED.value:
        state = torch.zeros(num_blocks, dtype=torch.int32, device=device)
        if pinned is not None and pinned.numel():
            count = pinned.numel()
            start(
                pin_kernel, triton.cdiv(count, _ENTRIES), device,
                (state, pinned, count, num_blocks), ENTRIES=_ENTRIES,
            )  # fmt: skip
    start(
        check_kernel, batch, device, (state, *movement.arguments), debug=True, ENTRIES=_ENTRIES,
        SELECTIONS=index_shape[0] * index_shape[1], **movement.options,
    )  # fmt: skip


def _index_shape(keep_indices: Tensor | None) -> tuple[int, int]:
    return (1, 1) if keep_indices is None else (keep_indices.shape[0], keep_indices.shape[1])


def compact_kv_(
    caches: list[Tensor],
    num_layers: int,
    segments: Tensor | None,
    keep_indices: Tensor | None,
    cu_kept: Tensor,
    cu_rows: Tensor | None,
    prefix_lens: Tensor | None,
    seq_lens: Tensor | None,
    seq_starts: Tensor | None,
    layout: str,
) -> tuple[Tensor, Tensor]:
    """See `adsc_kernels.ops.compact_kv_`, which checks; this is what it calls."""
    first = caches[0]
    tokens = first.shape[-2 if layout == "HND" else -3]
    movement = _movement(
        caches, segments, keep_indices, cu_kept, cu_rows, prefix_lens, seq_lens, seq_starts, None,
        1, tokens, (PACKED if seq_starts is not None else BATCHED).value, False,
    )  # fmt: skip
    if launch.CHECK:
        _check(movement, first.device, _index_shape(keep_indices), None)
    _move(caches, num_layers, layout, movement, None, _index_shape(keep_indices))
    batch = cu_kept.shape[0] - 1
    lens = torch.empty(batch, dtype=torch.int32, device=first.device)
    slots = torch.empty(batch, dtype=torch.int64, device=first.device)
    arguments = (lens, slots, None, None, None, *movement.arguments)
    start(outputs_kernel, 1, first.device, arguments, ENTRIES=_ENTRIES, **movement.options)
    return lens, slots


def compact_paged_kv_(
    caches: list[Tensor],
    num_layers: int,
    block_table: Tensor,
    block_size: int,
    segments: Tensor | None,
    keep_indices: Tensor | None,
    cu_kept: Tensor,
    cu_rows: Tensor | None,
    prefix_lens: Tensor | None,
    seq_lens: Tensor | None,
    edit_table: bool,
    pinned: Tensor | None,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `adsc_kernels.ops.compact_paged_kv_`, which checks; this is what it calls."""
    first = caches[0]
    num_blocks = first.shape[0]
    if first.dim() == 3:
        num_blocks = first.shape[1 if layout == "HND" else 0] // block_size
    movement = _movement(
        caches, segments, keep_indices, cu_kept, cu_rows, prefix_lens, seq_lens, None, block_table,
        num_blocks, block_size, PAGED.value, edit_table,
    )  # fmt: skip
    if launch.CHECK or pinned is not None:
        _check(movement, first.device, _index_shape(keep_indices), pinned)
    _move(caches, num_layers, layout, movement, block_size, _index_shape(keep_indices))
    batch = cu_kept.shape[0] - 1

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=first.device)

    lens, slots, last = empty(batch), empty(batch, dtype=torch.int64), empty(batch)
    indptr = empty(batch + 1)
    table = block_table.new_empty(block_table.shape if edit_table else (0, 0))
    programs = 1 + triton.cdiv(table.numel(), _ENTRIES)
    arguments = (lens, slots, last, indptr, table, *movement.arguments)
    start(outputs_kernel, programs, first.device, arguments, ENTRIES=_ENTRIES, **movement.options)
    return lens, slots, last, indptr, table
