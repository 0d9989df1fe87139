# mypy: allow-untyped-defs, allow-incomplete-defs
"""What a compaction of a KV cache moves: the twin of csrc/compaction.h.

A sequence's cached rows are `prefix | rows to choose from | suffix`; of the middle some stay, and
the new cache is prefix, those, suffix, without gaps. Row numbers count within a sequence.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from adsc_kernels.triton.launch import Packed, packed
from adsc_kernels.triton.segment import segment_source


class Lists(NamedTuple):
    """The tensors that say which rows stay and where they lie; None where there is no such list.

    With a table the cache is paged: row r of sequence b is token r % size of block
    table[b, r // size]. With seq_starts it is packed: token seq_starts[b] + r. With neither it is
    batched: token r of batch row b.
    """

    rows: Any  # segments [S, 6], or indices [layers or 1, heads or 1, num_indices]
    cu_kept: Any  # [batch + 1]
    cu_rows: Any  # [batch + 1]; None: all rows behind the prefix
    prefix_lens: Any  # [batch]; None: no prefix
    seq_lens: Any  # [batch]; None: no suffix
    seq_starts: Any = None  # [batch + 1]
    table: Any = None  # [batch, table_width]


# Numbers that differ from batch to batch or from cache to cache, which kernels take one by one:
# Triton compiles anew for the values in a tuple, and not for those of an argument named here.
# num_blocks: of the pool. size: tokens of a block, or of a cache that has none.
COUNTS = [
    "num_segments", "steps", "num_indices", "table_stride", "table_width", "num_blocks", "size",
    "batch",
]  # fmt: skip


class Mode(NamedTuple):
    """What kernels are compiled for."""

    EDIT_TABLE: bool
    BY_INDEX: bool
    INDEX_LAYERS: int
    INDEX_HEADS: int


class Compaction(NamedTuple):
    """All of it, as the functions below take it: put together in each kernel."""

    lists: Any
    num_segments: Any
    steps: Any
    num_indices: Any
    table_stride: Any
    table_width: Any
    num_blocks: Any
    size: Any
    batch: Any
    EDIT_TABLE: Any
    BY_INDEX: Any


class Call(NamedTuple):
    """The same on the host, as kernels take it."""

    lists: Lists
    packed: Packed  # the lists
    counts: tuple[int, ...]
    mode: Mode


def call_of(
    segments: Tensor | None,
    keep_indices: Tensor | None,
    bounds: list[Tensor | None],
    size: int,
    *,
    seq_starts: Tensor | None = None,
    table: Tensor | None = None,
    num_blocks: int = 1,
    edit_table: bool = False,
) -> Call:
    """bounds: cu_kept, cu_rows, prefix_lens, seq_lens."""
    rows = segments if keep_indices is None else keep_indices
    count = 0 if segments is None else segments.shape[0]
    steps = max(count - 1, 0).bit_length()
    shape = (1, 1, 0) if keep_indices is None else tuple(keep_indices.shape)
    pages = (0, 0) if table is None else (table.stride(0), table.shape[1])
    cu_kept = bounds[0]
    assert cu_kept is not None  # for the type checker
    lists = Lists(*[rows, *bounds, seq_starts, table])
    return Call(
        lists,
        packed(lists),
        (count, steps, shape[2], *pages, num_blocks, size, cu_kept.shape[0] - 1),
        # Without segments no row of the middle stays, and none may be looked up.
        Mode(edit_table, count == 0, *shape[:2]),
    )


class Sequence(NamedTuple):
    """The rows of one sequence, or of each of several."""

    prefix: Any
    source: Any  # rows to choose from
    kept: Any
    total: Any
    first_kept: Any  # number of the first that stays, in segments and indices
    first_row: Any  # what segments and indices call the first row to choose from


@triton.jit
def sequence_rows(c, b, inside):
    """Of sequence b."""
    cu_kept = c.lists.cu_kept + b
    first_kept = tl.load(cu_kept, mask=inside, other=0).to(tl.int64)
    kept = tl.load(cu_kept + 1, mask=inside, other=0).to(tl.int64) - first_kept
    prefix = first_kept * 0
    if c.lists.prefix_lens is not None:
        prefix = tl.load(c.lists.prefix_lens + b, mask=inside, other=0).to(tl.int64)
    first_row = first_kept * 0
    if c.lists.cu_rows is not None:
        cu_rows = c.lists.cu_rows + b
        begin = tl.load(cu_rows, mask=inside, other=0).to(tl.int64)
        source = tl.load(cu_rows + 1, mask=inside, other=0).to(tl.int64) - begin
        if not c.BY_INDEX:
            first_row = begin
        total = prefix + source
        if c.lists.seq_lens is not None:
            total = tl.load(c.lists.seq_lens + b, mask=inside, other=0).to(tl.int64)
    else:
        total = tl.load(c.lists.seq_lens + b, mask=inside, other=0).to(tl.int64)
        source = total - prefix
    return Sequence(prefix, source, kept, total, first_kept, first_row)


@triton.jit
def new_length(sequence):
    """How many rows the new cache has."""
    return sequence.total - sequence.source + sequence.kept


@triton.jit
def source_of(c, sequence, index, row, inside):
    """The old row that each row of the new cache takes. index: where the head's indices begin."""
    number = row - sequence.prefix
    chosen = inside & (number >= 0) & (number < sequence.kept)
    number = tl.where(chosen, sequence.first_kept + number, 0)
    if c.BY_INDEX:
        taken = tl.load(c.lists.rows + index + number, mask=chosen, other=0).to(tl.int64)
    else:
        taken, _ = segment_source(c.lists.rows, c.num_segments, c.steps, number)
    behind = tl.where(row < sequence.prefix, row, row + sequence.source - sequence.kept)
    return tl.where(chosen, sequence.prefix + taken - sequence.first_row, behind)


@triton.jit
def move_at(c, sequence, index, position, inside):
    """The old row that is taken at each position, and the one in whose place it is put, in an order
    in which a row is read before its place is written: see csrc/compaction.h."""
    row = position
    new = position
    if c.EDIT_TABLE:
        first = position // c.size * c.size
        last = tl.minimum(first + c.size, new_length(sequence)) - 1
        ending = source_of(c, sequence, index, last, inside)
        beginning = source_of(c, sequence, index, first, inside)
        # The page reuses the block of its last row if that row's offset already matches.
        backwards = ending % c.size == last % c.size
        row = tl.where(backwards, first + (last - position), position)
        new = tl.where(backwards, ending, beginning) // c.size * c.size + (row - first)
    return source_of(c, sequence, index, row, inside), new


@triton.jit
def place_in_cache(c, b, row, inside):
    """Block and token of an old row."""
    block = row * 0
    token = row
    if c.lists.table is not None:
        page = row // c.size
        token = row - page * c.size
        entry = c.lists.table + b * c.table_stride + page
        block = tl.load(entry, mask=inside, other=0).to(tl.int64)
    elif c.lists.seq_starts is not None:
        token = tl.load(c.lists.seq_starts + b).to(tl.int64) + row
    else:
        block = row * 0 + b
    return block, token
