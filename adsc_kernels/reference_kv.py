"""The oracle of the compaction ops: loops over tensors, sequences and rows. See `reference`.

Arguments as in the schemas of `torch.ops.adsc_kernels`, which `adsc_kernels.ops` checks and builds:
caches holds K of every layer, then V, then the scales of either.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from adsc_kernels.reference import source_rows

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
    layout: str,
) -> tuple[Tensor, Tensor]:
    """See `adsc_kernels.ops.compact_kv_`. Returns the new lengths and the next tokens' slots."""
    batched = seq_starts is None
    starts = None if seq_starts is None else seq_starts.tolist()
    room = caches[0].shape[2 if layout == "HND" else 1] if batched else 0

    def place(b: int, row: int) -> Place:
        return (b, row) if starts is None else (0, starts[b] + row)

    def move_to(b: int, row: int, sources: list[int]) -> Place:
        return place(b, row)

    lens = _compact(
        caches, num_layers, segments, keep_indices, cu_kept, cu_rows, prefix_lens, seq_lens,
        layout, place, move_to,
    )  # fmt: skip
    slots = []
    for b, length in enumerate(lens):
        if starts is None:
            slots.append(b * room + length if length < room else -1)
        else:
            slots.append(starts[b] + length if length < starts[b + 1] - starts[b] else -1)
    return (
        torch.tensor(lens, dtype=torch.int32, device=caches[0].device),
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
    layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `adsc_kernels.ops.compact_paged_kv_`. Returns the new lengths, the next tokens' slots,
    last_page_len, indptr and the new table (empty unless edit_table)."""
    table = block_table.tolist()
    new_table = [[-1] * block_table.shape[1] for _ in table]
    slots_only = caches[0].dim() == 3

    def place(b: int, row: int) -> Place:
        block, offset = table[b][row // block_size], row % block_size
        return (0, block * block_size + offset) if slots_only else (block, offset)

    def move_to(b: int, row: int, sources: list[int]) -> Place:
        page, offset = divmod(row, block_size)
        if not edit_table:
            return place(b, row)
        home = sources[page * block_size] // block_size  # the page of this page's first row
        new_table[b][page] = table[b][home]
        return place(b, home * block_size + offset)

    lens = _compact(
        caches, num_layers, segments, keep_indices, cu_kept, cu_rows, prefix_lens, seq_lens,
        layout, place, move_to,
    )  # fmt: skip
    slots, last, indptr = [], [], [0]
    for b, new in enumerate(lens):
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
        tensor(lens),
        tensor(slots, torch.int64),
        tensor(last),
        tensor(indptr),
        tensor(new_table, block_table.dtype).reshape(block_table.shape)
        if edit_table
        else block_table.new_empty((0, 0)),
    )


def _compact(
    caches: list[Tensor],
    num_layers: int,
    segments: Tensor | None,
    keep_indices: Tensor | None,
    cu_kept: Tensor,
    cu_rows: Tensor | None,
    prefix_lens: Tensor | None,
    seq_lens: Tensor | None,
    layout: str,
    place: Callable[[int, int], Place],
    move_to: Callable[[int, int, list[int]], Place],
) -> list[int]:
    """Moves all rows, each sequence's read before any is written. Returns the new lengths."""
    kept = cu_kept.tolist()
    batch = len(kept) - 1
    prefixes = [0] * batch if prefix_lens is None else prefix_lens.tolist()
    if cu_rows is None:
        assert seq_lens is not None
        rows = [0]
        for total, prefix in zip(seq_lens.tolist(), prefixes, strict=True):
            rows.append(rows[-1] + total - prefix)
    else:
        rows = cu_rows.tolist()
    ends = [prefixes[b] + rows[b + 1] - rows[b] for b in range(batch)]
    totals = ends if seq_lens is None else seq_lens.tolist()
    views = [_block_token_head(x, caches[0].dim(), layout) for x in caches]
    if keep_indices is None:
        stage: Any = SimpleNamespace(segments=segments, num_tokens=kept[-1])
        mapping = source_rows(stage)
    lens = []
    for b in range(batch):
        prefix, behind, total = prefixes[b], ends[b], totals[b]
        mine = slice(kept[b], kept[b + 1])

        def old_rows(layer: int, head: int) -> list[int]:
            """The old row of every new one."""
            if keep_indices is None:
                chosen = [row - rows[b] for row in mapping[mine]]  # noqa: B023
            else:
                layers, heads, _ = keep_indices.shape
                which = keep_indices[layer if layers > 1 else 0, head if heads > 1 else 0]
                chosen = which[mine].tolist()  # noqa: B023
            return [*range(prefix), *(prefix + row for row in chosen), *range(behind, total)]  # noqa: B023

        for i, view in enumerate(views):
            for head in range(view.shape[2]):
                old = old_rows(i % num_layers, head)
                taken = [view[(*place(b, row), head)].clone() for row in old]
                for row, value in enumerate(taken):
                    view[(*move_to(b, row, old), head)] = value
        lens.append(len(old_rows(0, 0)))
    return lens


def _block_token_head(x: Tensor, rank: int, layout: str) -> Tensor:
    """x as [blocks, tokens, heads, last], whatever dimensions it lacks."""
    if x.dim() == rank - 2:  # scales of tokens
        x = x.unsqueeze(-1)
    elif layout == "HND":
        x = x.transpose(rank - 3, rank - 2)
    if x.dim() == rank - 1:  # scales of heads
        x = x.unsqueeze(-1)
    return x if rank == 4 else x.unsqueeze(0)
