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

from adsc_kernels._planner import _C

_NO_ROWS = np.empty(0, np.int64)


class Ints(NamedTuple):
    """Lengths or boundaries that the host knows, with a copy on the device.

    The compaction ops take it wherever they take a list of ints: a list they upload in the call,
    this they don't, which is what a captured graph needs.

    host: a tuple of ints.
    device: contiguous int32 or int64 [as many]. Both must hold the same. On the CPU they are
      compared; elsewhere that would be a wait, and the host's rule what is checked, allotted and
      returned as host ints, the device's what is moved.
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

    seq_lens: cached rows of each sequence now; the device copy is int32 [B]. Under torch.compile
      host is empty, since a graph that held lengths would serve them alone.
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


class HostRows(NamedTuple):
    """How long the parts of each sequence are: prefix | rows to choose from | suffix.

    A graph that is traced knows no lengths, so that it serves all batches: all are empty then.
    batch: sequences.
    sources: the rows that are kept, counted within the second part, one array for each sequence;
      None where they are on a device, or differ from head to head, or nobody asks.
    """

    batch: int
    prefix_lens: tuple[int, ...]
    source_lens: tuple[int, ...]
    kept_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    sources: tuple[np.ndarray, ...] | None

    @property
    def new_lens(self) -> tuple[int, ...]:
        if self.source_lens is self.seq_lens:
            return self.kept_lens
        parts = zip(self.seq_lens, self.source_lens, self.kept_lens, strict=True)
        return tuple(total - source + kept for total, source, kept in parts)


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
    sources = None if rows.sources is None else np.concatenate([_NO_ROWS, *rows.sources])
    num_pages = -(-max(rows.seq_lens, default=0) // block_size)
    left = _C.check_pages(
        table[:, :num_pages].astype(np.int64, copy=False),
        rows.prefix_lens,
        rows.source_lens,
        rows.kept_lens,
        rows.seq_lens,
        sources,
        block_size,
        num_blocks,
        edit_table,
        read_only_blocks,
        name,
    )
    return None if left is None else Pages(*left)
