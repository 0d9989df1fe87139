"""Decoding in closed form: what a step needs to know is on the device, and advanced there.

Every sequence gets one row in every stage at every step. So rows, positions and lengths of step
t are those of step 0 plus t: no plan is made, nothing is uploaded, and a captured graph of a step
reads them as they are by then. A sequence that has ended goes on unread until all have: it has room
for as many rows as the others, and its cache is as long as the host says at the end.

A graph is of one batch size. So that few of them serve all batches, a step can be padded: sequences
behind the last are there for nothing but their rows, write nothing and see one key that is there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adsc_kernels import checks
from adsc_kernels.attention_keys import CachedKeys, Keys, PagedKeys
from adsc_kernels.cache import KVCache, StagePass
from adsc_kernels.paged_cache import PagedStageCache
from adsc_kernels.plan import to_device


@dataclass(frozen=True)
class StepRows:
    """One row of each sequence, which every boundary keeps: as much of a StagePlan as is asked."""

    segments: Tensor
    cu_seqlens: Tensor
    num_tokens: int

    @property
    def num_tokens_in(self) -> int:
        return self.num_tokens

    @property
    def seq_lens(self) -> tuple[int, ...]:
        return (1,) * self.num_tokens

    @property
    def max_seqlen(self) -> int:
        return min(1, self.num_tokens)

    @property
    def is_identity(self) -> bool:
        return True


LARGEST_BUCKET = 512  # rows; a step of more is long enough for the host to stay ahead of it


def bucket_of(size: int) -> int | None:
    """The batch size that a graph of a step of `size` sequences is captured with.

    Powers of two up to 8, then multiples of 8, as in engines; None above `LARGEST_BUCKET`.
    """
    if size > LARGEST_BUCKET:
        return None
    return 1 << max(size - 1, 0).bit_length() if size <= 8 else -(-size // 8) * 8


class DecodeState:
    """Where each sequence stands in each stage, for the steps behind what `cache` holds.

    counters: int64 [stages, 2, B], the cache row that a sequence's next key goes to and its
    position. bounds: int32 [stages, 2 * B + 1], `CachedKeys.cu_seqlens_k` with that key. Both on
    the cache's device. `tables`: what else a step reads, and no step writes. `done`: steps so far.
    `longest`: an upper bound on the keys of a sequence in each stage, over all steps. Of a paged
    cache rows are counted within their sequence, and block_tables, int32 [B, blocks] of each stage,
    say where those are. `inputs`: all these tensors, as `passes` takes them.

    Padded, B is `padded`, and the rows behind the batch's own go to row -1 and see row 0: no list
    of cumulative lengths, but for what reads it pair by pair (`Backend.by_address`). Then the steps
    are to be a graph over `addresses`; `place`: for a model to note its own memory once for all.
    """

    def __init__(
        self, cache: KVCache, cached: Sequence[int], steps: int, padded: int | None = None
    ) -> None:
        """cached: tokens that have been run of each sequence. steps: how many may follow.

        Raises ValueError where the cache has no room for them.
        """
        checks.instance("cache", cache, KVCache)
        checks.integer("steps", steps, 0)
        self.cache, self.steps, self.done = cache, steps, 0
        self.size = size = len(cached)
        self.padded = padded
        self.place: tuple[Hashable, ...] = ()
        rows = size if padded is None else checks.integer("padded", padded, size)
        self._lens = [stage.lens for stage in cache.stages]
        counters = np.zeros((len(cache.stages), 2, rows), np.int64)
        bounds = np.zeros((len(cache.stages), 2 * rows + 1), np.int32)
        for s in range(len(cache.stages)):
            self._begin(s, cached, counters[s], bounds[s])
        # Longer in powers of two, so that as many graphs serve sequences of all lengths.
        capacities = [max(stage.capacities, default=0) for stage in cache.stages]
        self.longest = tuple(1 << max(n - 1, 0).bit_length() for n in capacities)
        device = cache.device
        self.counters, self.bounds = to_device(counters, device), to_device(bounds, device)
        self.block_tables = tuple(
            to_device(stage.block_table(rows, -(-n // stage.block_size)), device)
            for stage, n in zip(cache.stages, self.longest, strict=True)
            if isinstance(stage, PagedStageCache)
        )
        self.inputs = (self.counters, self.bounds, *self.block_tables)
        each = np.arange(rows + 1, dtype=np.int32)
        # Of a sequence and the gap behind it the sequence has all rows: 0, 1, 1, 2, 2 ...
        queries = np.repeat(each, 2)[1:]
        own = each[:-1] < size
        grows = np.append(np.stack((np.zeros_like(own), own), 1), False).astype(np.int32)
        table = np.array([[0, 0, rows, rows, 0, 0]] if rows else np.empty((0, 6)), np.int32)
        self._queries, self._grows = to_device(queries, device), to_device(grows, device)
        self._moves = to_device(own.astype(np.int64), device)
        self._rows = StepRows(to_device(table, device), to_device(each, device), rows)
        self.tables = self._queries, self._rows
        self.addresses = None if padded is None else cache.addresses()

    def _begin(
        self, s: int, cached: Sequence[int], counters: np.ndarray, bounds: np.ndarray
    ) -> None:
        """Fill in what stage s has of them."""
        stage, size = self.cache.stages[s], self.size
        if len(stage.lens) != size:
            raise ValueError(f"cached: expected {len(stage.lens)} sequences, got {size}")
        ends = [n + self.steps for n in stage.lens]
        if any(n > c for n, c in zip(ends, stage.capacities, strict=True)):
            raise ValueError(f"cache: expected room for {ends}, got {stage.capacities}")
        starts = np.array(stage.starts)
        counters[0, :size], counters[0, size:] = starts[:-1] + stage.lens, -1
        gone = [len(rows) for rows in stage.gone]  # a plan counts these too
        renumber = self.cache.schedule.positions == "renumber"
        counters[1, :size] = np.add(stage.lens, gone) if renumber else cached
        bounds[: 2 * size : 2] = starts[:-1]
        bounds[1 : 2 * size : 2] = starts[:-1] + stage.lens + 1
        bounds[2 * size + 1 :: 2], bounds[-1] = 1, starts[-1]

    def passes(self, counters: Tensor, bounds: Tensor, *block_tables: Tensor) -> list[StagePass]:
        """The next step over these, which are this state's own, or a graph's copies of them."""
        passes = []
        for s, stage in enumerate(self.cache.stages):
            slots, positions = counters[s]
            keys: Keys
            if isinstance(stage, PagedStageCache):
                size, table = stage.block_size, block_tables[s]
                slots = _slots(slots, table, size)
                keys = PagedKeys(self._key_lens(s), self.longest[s], size, table, bounds[s])
            else:
                keys = self._keys(s, bounds)
            same = self._rows
            passes.append(StagePass(stage.layers, same, same, positions, slots, keys))
        return passes

    def _key_lens(self, s: int) -> tuple[int, ...]:
        padding = self._rows.num_tokens - self.size
        return tuple(n + self.done + 1 for n in self._lens[s]) + (1,) * padding

    def _keys(self, s: int, bounds: Tensor) -> CachedKeys:
        padding = self._rows.num_tokens - self.size
        return CachedKeys(
            starts=self.cache.stages[s].starts[: self.size] + (0,) * padding,
            lens=self._key_lens(s),
            max_len=self.longest[s],  # all that the host tells a kernel
            cu_seqlens_q=self._queries,
            cu_seqlens_k=bounds[s],
        )

    def advance(self) -> None:
        """A step has been run."""
        if self.done == self.steps:
            raise ValueError(f"steps: expected at most {self.steps}, which have been run")
        self.counters += self._moves
        self.bounds += self._grows
        self.done += 1

    def keep(self, counts: Sequence[int]) -> None:
        """Of the steps' rows the first `counts[b]` of each sequence now count as cached."""
        for stage, lens in zip(self.cache.stages, self._lens, strict=True):
            stage.lens = tuple(n + c for n, c in zip(lens, counts, strict=True))


def _slots(rows: Tensor, table: Tensor, block_size: int) -> Tensor:
    """The slots of rows, int64 [B], of their sequences; what is below 0 stays."""
    column = torch.div(rows, block_size, rounding_mode="floor").clamp_min_(0)
    blocks = table.gather(1, column[:, None])[:, 0]
    slots = torch.add(rows.remainder(block_size), blocks, alpha=block_size)
    return torch.where(rows < 0, rows, slots)
