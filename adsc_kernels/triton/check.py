# mypy: allow-untyped-defs, allow-incomplete-defs
"""What ADSC_CHECK=1 and read-only blocks ask for before a compaction: launches that read all that
the moves depend on, write no cache, and stop the program with a message."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adsc_kernels.triton.compaction import (
    COUNTS,
    Call,
    Compaction,
    move_at,
    new_length,
    place_in_cache,
    sequence_rows,
    source_of,
)
from adsc_kernels.triton.launch import cdiv, start

# What is known of a block of the pool, in one word.
READ_ONLY = tl.constexpr(1)
IN_TABLE = tl.constexpr(2)

_ENTRIES = 256  # of a list or a table, for one program at a time


@triton.jit(do_not_specialize=["count", "num_blocks"])
def mark_read_only_kernel(state, blocks, count, num_blocks, ENTRIES: tl.constexpr):
    """Marks the blocks that may not be written; those outside of the pool are nobody's."""
    i = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    block = tl.load(blocks + i, mask=i < count, other=-1).to(tl.int64)
    tl.store(state + block, READ_ONLY, mask=(block >= 0) & (block < num_blocks))


@triton.jit
def check_lists(c, sequence, b):
    """The lengths and boundaries of sequence b, against one another and against the room."""
    ok = (sequence.kept >= 0) & (sequence.kept <= sequence.source) & (sequence.first_kept >= 0)
    tl.device_assert(ok, "cu_kept: boundaries that don't rise, or more than there are to keep")
    if c.lists.cu_rows is not None:
        ok = (tl.load(c.lists.cu_rows + b) >= 0) & (sequence.source >= 0)
        tl.device_assert(ok, "cu_rows: boundaries that don't rise from 0")
    tl.device_assert(sequence.prefix >= 0, "prefix_lens: a negative length")
    room = tl.cast(c.size, tl.int64)
    if c.lists.table is not None:
        room = room * c.table_width
    elif c.lists.seq_starts is not None:
        begin = tl.load(c.lists.seq_starts + b).to(tl.int64)
        end = tl.load(c.lists.seq_starts + b + 1).to(tl.int64)
        ok = (begin >= 0) & (end >= begin) & (end <= c.size)
        tl.device_assert(ok, "seq_starts: boundaries that don't rise, or past the cache")
        room = end - begin
    ok = (sequence.total >= sequence.prefix + sequence.source) & (sequence.total <= room)
    tl.device_assert(ok, "seq_lens: less than prefix and rows, or more than there is room for")
    if c.BY_INDEX:
        ok = tl.load(c.lists.cu_kept + c.batch) <= c.num_indices
        tl.device_assert(ok, "keep_indices: fewer than cu_kept says")


@triton.jit
def check_table(c, sequence, b, state, ENTRIES: tl.constexpr):
    """Every block in the pool, and in one place of all tables unless it is read-only."""
    pages = (sequence.total + c.size - 1) // c.size
    for first in tl.range(0, pages, ENTRIES):
        page = first + tl.arange(0, ENTRIES)
        entry = c.lists.table + b * c.table_stride + page
        block = tl.load(entry, mask=page < pages, other=0).to(tl.int64)
        inside = (block >= 0) & (block < c.num_blocks)
        tl.device_assert(inside, "block_table: a block outside of the pool")
        before = tl.atomic_or(state + block, IN_TABLE, mask=(page < pages) & inside)
        once = (before != IN_TABLE) | (page >= pages)
        tl.device_assert(once, "block_table: a block twice that isn't in read_only_blocks")


@triton.jit
def check_rows(c, sequence, index, ENTRIES: tl.constexpr):
    """The rows that stay rise within those to choose from."""
    for first in tl.range(0, sequence.kept, ENTRIES):
        row = sequence.prefix + first + tl.arange(0, ENTRIES)
        inside = row < sequence.prefix + sequence.kept
        old = source_of(c, sequence, index, row, inside)
        behind = inside & (row > sequence.prefix)
        before = source_of(c, sequence, index, row - 1, behind)
        before = tl.where(behind, before, sequence.prefix - 1)
        rising = (old > before) & (old < sequence.prefix + sequence.source) | ~inside
        tl.device_assert(rising, "segments, keep_indices: rows that don't rise in the sequence")


@triton.jit
def check_writes(c, sequence, b, index, state, ENTRIES: tl.constexpr):
    """No row is moved into a read-only block."""
    length = new_length(sequence)
    pages = (length + c.size - 1) // c.size
    pages = tl.where(sequence.source == sequence.kept, 0, pages)  # all stay: nothing moves
    for first in tl.range(0, pages, ENTRIES):
        page = first + tl.arange(0, ENTRIES)
        inside = page < pages
        # If the first and the last row of a page are in their places, all are.
        old, new = move_at(c, sequence, index, page * c.size, inside)
        last = tl.minimum((page + 1) * c.size, length) - 1
        old_last, new_last = move_at(c, sequence, index, last, inside)
        block, _ = place_in_cache(c, b, new, inside)
        read_only = (tl.atomic_or(state + block, 0, mask=inside) & READ_ONLY) != 0
        written = inside & ((old != new) | (old_last != new_last))
        tl.device_assert(
            ~(read_only & written), "read_only_blocks: a block that a move would write"
        )


@triton.jit(do_not_specialize=COUNTS)
def check_kernel(
    state, lists,
    num_segments, steps, num_indices, table_stride, table_width, num_blocks, size, batch,
    ENTRIES: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """One program looks at all that one sequence's moves depend on, before anything is written.

    state: of every block of a paged cache.
    """
    c = Compaction(
        lists, num_segments, steps, num_indices, table_stride, table_width, num_blocks, size, batch,
        MODE.EDIT_TABLE, MODE.BY_INDEX,
    )  # fmt: skip
    SELECTIONS: tl.constexpr = MODE.INDEX_LAYERS * MODE.INDEX_HEADS
    b = tl.program_id(0).to(tl.int64)
    sequence = sequence_rows(c, b, True)
    check_lists(c, sequence, b)
    tl.debug_barrier()  # nothing is looked up by what is wrong
    if lists.table is not None:
        check_table(c, sequence, b, state, ENTRIES)
    for selection in range(SELECTIONS):
        check_rows(c, sequence, selection * num_indices, ENTRIES)
    tl.debug_barrier()
    if lists.table is not None:
        for selection in range(SELECTIONS):
            check_writes(c, sequence, b, selection * num_indices, state, ENTRIES)


def check(call: Call, device: torch.device, read_only_blocks: Tensor | None = None) -> None:
    """Stops the program with a message where the lists or the table lead outside, rows don't rise,
    two pages share a block that isn't read-only, or a move would write a read-only one."""
    *_, num_blocks, _, batch = call.counts
    state = None
    if call.lists.table is not None:
        state = torch.zeros(num_blocks, dtype=torch.int32, device=device)
        count = 0 if read_only_blocks is None else read_only_blocks.numel()
        if count > 0:
            arguments = (state, read_only_blocks, count, num_blocks)
            programs = cdiv(count, _ENTRIES)
            start(mark_read_only_kernel, programs, device, arguments, ENTRIES=_ENTRIES)
    start(
        check_kernel,
        batch,
        device,
        (state, call.packed, *call.counts),
        debug=True,
        ENTRIES=_ENTRIES,
        MODE=call.mode,
    )
