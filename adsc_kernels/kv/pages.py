"""What the host knows of a cache's compaction: lengths, and the blocks of a paged cache.

All of it follows from lengths and block tables in host memory; no tensor on a device is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Ints(NamedTuple):
    """Lengths or boundaries that the host knows, with a copy on the device.

    The compaction ops take it wherever they take a list of ints: a list they upload in the call,
    this they don't, which is what a captured graph needs.

    host: a tuple of ints.
    device: contiguous int32 or int64 [as many]. Both must hold the same; the host can't compare
      them without waiting for the device, and doesn't.
    """

    host: tuple[int, ...]
    device: Tensor

    @classmethod
    def of(cls, values: Sequence[int], device: torch.device | str) -> Ints:
        """values with a copy on `device`: one upload, without synchronisation."""
        host = tuple(values)
        if torch.device(device).type != "cuda" or torch.compiler.is_compiling():
            return cls(host, torch.tensor(host, dtype=torch.int32, device=device))
        staged = torch.tensor(host, dtype=torch.int32, pin_memory=True)
        return cls(host, staged.to(device, non_blocking=True))


@dataclass(frozen=True, eq=False)
class CompactionResult:
    """The cache after a compaction. Device tensors are written by the launch that moved the rows.

    seq_lens: cached rows of each sequence now; the device copy is int32 [B].
    slot_mapping: int64 [B]: the slot of each sequence's next token, as engines number slots:
      block * block_size + offset for a paged cache, the row for a packed one, b * capacity + row
      for a batched one; -1 where the sequence has no room for it (dense) or needs another block.
    Paged only, else None:
      block_table: [B, max_blocks], the table to use from now on. The one that was given, unless
        `edit_table` was; then a new one, with -1 behind each sequence's blocks.
      last_page_len: int32 [B]: rows in each sequence's last block, 1 to block_size; 0 without rows.
      indptr: int32 [B + 1]: blocks of the sequences before, FlashInfer's kv_indptr.
      released_blocks: for each sequence the blocks it had and no longer uses, int64 and in the
        order of the table: what an engine that counts references lowers the count of. None where
        the host can't tell: without a table in host memory, under torch.compile, and with
        edit_table and keep_indices on a device.
      free_blocks: those of them that no other sequence of the call uses and that aren't in
        read_only_blocks, each once. None where released_blocks is.
    """

    seq_lens: Ints
    slot_mapping: Tensor
    block_table: Tensor | None = None
    last_page_len: Tensor | None = None
    indptr: Tensor | None = None
    released_blocks: tuple[np.ndarray, ...] | None = None
    free_blocks: np.ndarray | None = None


@dataclass(frozen=True)
class HostRows:
    """How long the parts of each sequence are: prefix | rows to choose from | suffix.

    sources: the rows that are kept, counted within the second part, one array for each sequence;
      None where they are on a device, or differ from head to head, or nobody asks.
    """

    prefix_lens: tuple[int, ...]
    source_lens: tuple[int, ...]
    kept_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    sources: tuple[np.ndarray, ...] | None

    @property
    def new_lens(self) -> tuple[int, ...]:
        parts = zip(self.seq_lens, self.source_lens, self.kept_lens, strict=True)
        return tuple(total - source + kept for total, source, kept in parts)

    def moves(self, b: int) -> bool:
        """Whether any row of sequence b may move."""
        return self.kept_lens[b] < self.source_lens[b]

    def source_of(self, b: int, rows: np.ndarray) -> np.ndarray:
        """The rows of the old cache that `rows` of the new one take."""
        assert self.sources is not None
        prefix, kept = self.prefix_lens[b], self.kept_lens[b]
        moved = rows + (self.source_lens[b] - kept)  # right for the suffix
        inside = (rows >= prefix) & (rows < prefix + kept)
        moved[inside] = prefix + self.sources[b][rows[inside] - prefix]
        return np.where(rows < prefix, rows, moved)


@dataclass(frozen=True)
class Pages:
    """The blocks of a paged cache before and after."""

    released: tuple[np.ndarray, ...]
    free: np.ndarray


def check_pages(
    table: np.ndarray,
    rows: HostRows,
    block_size: int,
    num_blocks: int,
    edit_table: bool,
    read_only_blocks: np.ndarray,
    name: str,
) -> Pages | None:
    """What the contents of a block table forbid, and which blocks a compaction leaves over.

    None where that takes keep_indices that aren't on the host.
    Raises ValueError naming `name` for an entry outside the pool and for a block that is used twice
    and isn't in read_only_blocks, and naming read_only_blocks for one that would be written.
    """
    old_pages = [-(-n // block_size) for n in rows.seq_lens]
    new_pages = [-(-n // block_size) for n in rows.new_lens]
    used = [table[b, :n] for b, n in enumerate(old_pages)]
    for b, blocks in enumerate(used):
        outside = np.flatnonzero((blocks < 0) | (blocks >= num_blocks))
        if outside.size:
            page = int(outside[0])
            raise ValueError(
                f"{name}: expected blocks in [0, {num_blocks}), got {blocks[page]} at [{b}, {page}]"
            )
    every = np.sort(_joined(used))
    shared = every[1:][every[1:] == every[:-1]]  # the read-only ones too
    if shared.size and not np.isin(shared, read_only_blocks).all():
        block = shared[~np.isin(shared, read_only_blocks)][0]
        raise ValueError(
            f"{name}: expected every block once, or named in read_only_blocks, got "
            f"block {block} {(every == block).sum()} times"
        )
    kept, released = [], []
    for b, pages in enumerate(new_pages):
        known = not edit_table or rows.sources is not None
        homes = _homes(rows, b, pages, block_size, edit_table) if known else None
        if read_only_blocks.size:
            if homes is None:
                first = rows.prefix_lens[b] // block_size
                touched = used[b][first:] if rows.moves(b) and first < pages else used[b][:0]
            else:
                touched = used[b][homes[_written(rows, b, homes, block_size)]]
            hit = np.isin(touched, read_only_blocks)
            if hit.any():
                raise ValueError(
                    f"read_only_blocks: expected no move into block {touched[hit][0]}, but "
                    f"sequence {b} would write to it"
                )
        if homes is not None:
            stays = np.zeros(old_pages[b], bool)
            stays[homes] = True
            kept.append(used[b][stays])
            released.append(used[b][~stays].astype(np.int64))
    if len(kept) < len(used):
        return None
    free = np.sort(_joined(released))
    if shared.size or read_only_blocks.size:
        free = np.unique(free[~np.isin(free, _joined([*kept, read_only_blocks]))])
    return Pages(tuple(released), free)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _homes(rows: HostRows, b: int, num_pages: int, block_size: int, edit_table: bool) -> np.ndarray:
    """For each page of sequence b's new cache the old page whose block it takes."""
    pages = np.arange(num_pages)
    if not edit_table:
        return pages
    first = pages * block_size
    last = np.minimum(first + block_size, rows.new_lens[b]) - 1
    sources = rows.source_of(b, last)
    in_place = sources % block_size == last % block_size
    return np.where(in_place, sources, rows.source_of(b, first)) // block_size


def _written(rows: HostRows, b: int, homes: np.ndarray, block_size: int) -> np.ndarray:
    """Whether a row is moved into each page of sequence b's new cache."""
    pages = np.arange(len(homes))
    if rows.sources is None:
        # Any page from the first that could move on, since nobody here knows which rows are kept.
        return pages >= (rows.prefix_lens[b] // block_size if rows.moves(b) else len(pages))
    first = pages * block_size
    last = np.minimum(first + block_size, rows.new_lens[b]) - 1
    # A row's distance to its source never falls within a sequence: if the first and the last row of
    # a page are in their places, all are.
    moved = rows.source_of(b, first) != homes * block_size
    return moved | (rows.source_of(b, last) != homes * block_size + (last - first))
