"""A stage's key-value cache in blocks, as engines hold it: `KVCache(..., block_size=)`.

The rows of a sequence lie in the blocks of its table, wherever those are, and a table is as long as
its sequence needs. So a sequence grows by blocks behind all that are there, and what is cached
keeps its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from adsc_kernels import ops
from adsc_kernels.attention_keys import PagedKeys, in_blocks
from adsc_kernels.cache import StageCache
from adsc_kernels.plan import to_device

if TYPE_CHECKING:
    from adsc_kernels.plan import StagePlan


class PagedStageCache(StageCache):
    """K and V of one stage's layers: `k[i]` and `v[i]` are [blocks * block_size, H_kv, D].

    `blocks[b]` are the blocks of sequence b: its row r is row r % block_size of block
    `blocks[b][r // block_size]`. There are as many as the sequences need, and none that is free.
    """

    def __init__(self, layers: range, num_sequences: int, *form: Any, block_size: int) -> None:
        super().__init__(layers, num_sequences, *form)
        self.block_size = block_size
        self.blocks: list[list[int]] = [[] for _ in range(num_sequences)]

    @property
    def starts(self) -> tuple[int, ...]:
        """Each sequence counts its rows for itself."""
        return (0,) * (len(self.blocks) + 1)

    def fit(self, needed: Sequence[int]) -> None:
        """As many blocks as `needed[b]` rows of each sequence take; layer by layer, as the dense.

        Blocks behind those are given back, and the others close up, in their order.
        """
        self._check_room(needed)
        counts = [-(-n // self.block_size) for n in needed]
        if counts == [len(blocks) for blocks in self.blocks]:
            return
        kept = [blocks[:n] for blocks, n in zip(self.blocks, counts, strict=True)]
        old = sorted(chain(*kept))
        new = {block: n for n, block in enumerate(old)}
        fresh = iter(range(len(old), sum(counts)))
        index = to_device(np.array(old, np.int64), self._device)
        for tensors in (self.k, self.v):
            for i, rows in enumerate(tensors):
                tensors[i] = rows.new_empty((sum(counts) * self.block_size, *rows.shape[1:]))
                new_rows, old_rows = (in_blocks(x, self.block_size) for x in (tensors[i], rows))
                new_rows[: len(old)] = old_rows[index]
        self.blocks = [
            [new[block] for block in blocks] + [next(fresh) for _ in range(n - len(blocks))]
            for blocks, n in zip(kept, counts, strict=True)
        ]
        self.capacities = tuple(n * self.block_size for n in counts)

    def slots(self, b: int, begin: int, end: int) -> np.ndarray:
        """As of the dense cache; what engines call a slot mapping."""
        rows = np.arange(begin, end)
        blocks = np.array(self.blocks[b], np.int64)
        return blocks[rows // self.block_size] * self.block_size + rows % self.block_size

    def keys(self, stage: StagePlan, lens: Sequence[int]) -> PagedKeys:
        """As of the dense cache."""
        return PagedKeys.build(lens, self.block_size, self.block_table(), self._device)

    def block_table(self, rows: int = 0, columns: int = 0) -> np.ndarray:
        """int32 [B, blocks], -1 behind each sequence's own; of so many rows and columns at least,
        the rows behind the batch's of block 0."""
        columns = max([columns, *map(len, self.blocks)])
        table = np.zeros((max(rows, len(self.blocks)), columns), np.int32)
        for b, blocks in enumerate(self.blocks):
            table[b] = blocks + [-1] * (columns - len(blocks))
        return table

    def _move(self, mapping: StagePlan, prefix: tuple[int, ...]) -> tuple[int, ...]:
        table = self.block_table()
        result = ops.compact_paged_kv_(
            [in_blocks(rows, self.block_size) for rows in self.k],
            [in_blocks(rows, self.block_size) for rows in self.v],
            to_device(table, self._device),
            mapping,
            prefix_lens=prefix,
            seq_lens=self.lens,
            block_table_host=table,
        )
        return result.seq_lens.host
