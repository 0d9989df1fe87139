"""The oracle of the ops on caches: loops over tensors, sequences and rows."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from adsc_kernels.reference.rows import boundary_step
from adsc_kernels.reference.rule import source_rows

Place = tuple[int, int]  # block, token


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
    cache_layout: str,
) -> tuple[Tensor, Tensor]:
    """Returns the new lengths and the next tokens' slots."""
    rows = _Rows(segments, keep_indices, cu_kept, cu_rows, prefix_lens, seq_lens)
    starts = None if seq_starts is None else seq_starts.tolist()
    room = caches[0].shape[2 if cache_layout == "HND" else 1] if starts is None else 0

    def place(b: int, row: int) -> Place:
        return (b, row) if starts is None else (0, starts[b] + row)

    def move_to(b: int, row: int, sources: list[int]) -> Place:
        return place(b, row)

    _move(caches, num_layers, cache_layout, rows, place, move_to)
    slots = []
    for b, length in enumerate(rows.new_lens):
        if starts is None:
            slots.append(b * room + length if length < room else -1)
        else:
            slots.append(starts[b] + length if length < starts[b + 1] - starts[b] else -1)
    return (
        torch.tensor(rows.new_lens, dtype=torch.int32, device=caches[0].device),
        torch.tensor(slots, dtype=torch.int64, device=caches[0].device),
    )


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
    read_only_blocks: Tensor | None,
    cache_layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the new lengths, the next tokens' slots, last_page_len, indptr
    and the new table (empty unless edit_table).

    Raises ValueError naming block_table or read_only_blocks, as the ops do.
    """
    rows = _Rows(segments, keep_indices, cu_kept, cu_rows, prefix_lens, seq_lens)
    table = block_table.tolist()
    new_table = [[-1] * block_table.shape[1] for _ in table]
    slots_only = caches[0].dim() == 3

    def place(b: int, row: int) -> Place:
        block, offset = table[b][row // block_size], row % block_size
        return (0, block * block_size + offset) if slots_only else (block, offset)

    def move_to(b: int, row: int, sources: list[int]) -> Place:
        if not edit_table:
            return place(b, row)
        page, offset = divmod(row, block_size)
        last = min((page + 1) * block_size, len(sources)) - 1
        # The page reuses the block of its last row if that row's offset already matches.
        in_place = sources[last] % block_size == last % block_size
        home = sources[last if in_place else page * block_size] // block_size
        new_table[b][page] = table[b][home]
        return place(b, home * block_size + offset)

    untouchable = set([] if read_only_blocks is None else read_only_blocks.tolist())
    used = [block for b, n in enumerate(rows.lens) for block in table[b][: -(-n // block_size)]]
    for block in used:
        if used.count(block) > 1 and block not in untouchable:
            raise ValueError(
                f"block_table: expected every block once, or named in read_only_blocks, got "
                f"block {block} {used.count(block)} times"
            )
    for b, layer, head in rows.selections:
        old = rows.old(b, layer, head)
        for row, source in enumerate(old):
            at = move_to(b, row, old)
            block = at[1] // block_size if slots_only else at[0]
            if at != place(b, source) and block in untouchable:
                raise ValueError(
                    f"read_only_blocks: expected no move into block {block}, but sequence {b} "
                    "would write to it"
                )
    _move(caches, num_layers, cache_layout, rows, place, move_to)
    slots, last, indptr = [], [], [0]
    for b, new in enumerate(rows.new_lens):
        pages = -(-new // block_size)
        if new % block_size:
            block = (new_table if edit_table else table)[b][pages - 1]
            slots.append(block * block_size + new % block_size)
        else:
            slots.append(-1)
        last.append(new - (pages - 1) * block_size if pages else 0)
        indptr.append(indptr[-1] + pages)

    def tensor(values: object, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=caches[0].device)

    return (
        tensor(rows.new_lens),
        tensor(slots, torch.int64),
        tensor(last),
        tensor(indptr),
        tensor(new_table, block_table.dtype).reshape(block_table.shape)
        if edit_table
        else block_table.new_empty((0, 0)),
    )


def compress_step(*arguments: Any) -> tuple[Tensor, ...]:
    """`boundary_step`, whose results it writes into outs, and one of the compaction ops."""
    boundary, outs = arguments[:13], arguments[-1]
    caches, num_layers, block_table, block_size = arguments[13:17]
    rows, (seq_starts, *paged, cache_layout) = arguments[17:23], arguments[23:-1]
    for out, x in zip(outs, boundary_step(*boundary), strict=True):
        out.copy_(x)
    if block_table is not None:
        given = (caches, num_layers, block_table, block_size, *rows, *paged, cache_layout)
        return compact_paged_kv_(*given)
    given = (caches, num_layers, *rows, seq_starts, cache_layout)
    none = (caches[0].new_empty(0, dtype=torch.int32) for _ in range(3))
    return (*compact_kv_(*given), *none)


class _Rows:
    """Which old row each row of the new cache takes.

    lens, new_lens: rows of each sequence before and after.
    selections: each sequence with every layer and head that may choose rows of its own.
    """

    def __init__(
        self,
        segments: Tensor | None,
        keep_indices: Tensor | None,
        cu_kept: Tensor,
        cu_rows: Tensor | None,
        prefix_lens: Tensor | None,
        seq_lens: Tensor | None,
    ) -> None:
        self._kept = cu_kept.tolist()
        batch = len(self._kept) - 1
        self._prefixes = [0] * batch if prefix_lens is None else prefix_lens.tolist()
        if cu_rows is None:
            assert seq_lens is not None
            self._rows = [0]
            for total, prefix in zip(seq_lens.tolist(), self._prefixes, strict=True):
                self._rows.append(self._rows[-1] + total - prefix)
        else:
            self._rows = cu_rows.tolist()
        self._ends = [self._prefixes[b] + self._rows[b + 1] - self._rows[b] for b in range(batch)]
        self.lens = self._ends if seq_lens is None else seq_lens.tolist()
        self._indices = keep_indices
        if keep_indices is None:
            self._mapping = source_rows(segments, None, self._kept[-1])
        self.new_lens = [len(self.old(b, 0, 0)) for b in range(batch)]
        layers, heads = (1, 1) if keep_indices is None else keep_indices.shape[:2]
        self.selections = list(product(range(batch), range(layers), range(heads)))

    def old(self, b: int, layer: int, head: int) -> list[int]:
        """The old row of every new one of sequence b."""
        mine = slice(self._kept[b], self._kept[b + 1])
        if self._indices is None:
            chosen = [row - self._rows[b] for row in self._mapping[mine]]
        else:
            layers, heads, _ = self._indices.shape
            which = self._indices[layer if layers > 1 else 0, head if heads > 1 else 0]
            chosen = which[mine].tolist()
        prefix = self._prefixes[b]
        behind = range(self._ends[b], self.lens[b])
        return [*range(prefix), *(prefix + row for row in chosen), *behind]


def _move(
    caches: list[Tensor],
    num_layers: int,
    layout: str,
    rows: _Rows,
    place: Callable[[int, int], Place],
    move_to: Callable[[int, int, list[int]], Place],
) -> None:
    """Moves all rows, each sequence's read before any is written."""
    views = [_block_token_head(x, caches[0].dim(), layout) for x in caches]
    for b in range(len(rows.lens)):
        for i, view in enumerate(views):
            for head in range(view.shape[2]):
                old = rows.old(b, i % num_layers, head)
                taken = [view[(*place(b, row), head)].clone() for row in old]
                for row, value in enumerate(taken):
                    view[(*move_to(b, row, old), head)] = value


def _block_token_head(x: Tensor, rank: int, layout: str) -> Tensor:
    """x as [blocks, tokens, heads, last], whatever dimensions it lacks."""
    if x.dim() == rank - 2:  # scales of tokens
        x = x.unsqueeze(-1)
    elif layout == "HND":
        x = x.transpose(rank - 3, rank - 2)
    if x.dim() == rank - 1:  # scales of heads
        x = x.unsqueeze(-1)
    return x if rank == 4 else x.unsqueeze(0)
