"""The key-value cache of a compressed model: one for each stage, as long as that stage needs.

A dropped token never writes K or V in the stages after its boundary, so nothing has to be compacted
after a prompt: stage s simply holds `plan.stages[s].kv_lens[b]` rows of sequence b. What is written
can be shrunk further, in place: the layers before the first boundary, and older pictures. A plan
doesn't know of it, so each stage keeps a list of the rows that are gone; positions are the plan's.
`paged_cache.py` has the same in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adsc_kernels import checks, ops
from adsc_kernels.attention_keys import CachedKeys, Keys
from adsc_kernels.plan import make_plan, to_device
from adsc_kernels.schedule import CompressionSchedule

if TYPE_CHECKING:
    from adsc_kernels.decode import StepRows
    from adsc_kernels.plan import CompressionPlan, StagePlan


class Phase(Enum):
    """What a pass is for. Its caller says so: no length tells, since a prompt can be one token."""

    PREFILL = "prefill"  # whole prompts, nothing cached: the keys are the chunk's own rows
    CHUNKED_PREFILL = "chunked prefill"  # a part of each prompt, behind the parts before it
    LATER_TURN = "later turn"  # new text and pictures, behind a conversation that is cached
    DECODE = "decode"  # the token generated last, of every sequence still going


class LayerRows(NamedTuple):
    """K and V of a layer, [rows, H_kv, D]. address: see `CachedKeys`; of what is written too."""

    k: Tensor
    v: Tensor
    address: Tensor | None = None


@dataclass(frozen=True)
class StagePass:
    """What a stage's layers share in one pass; everything that is uploaded for them is.

    The cache's own rows are no part of it: a graph keeps its tables, and no cache's memory.
    """

    layers: range
    rows: StagePlan | StepRows  # this stage's, and where they come from
    same: StagePlan | StepRows  # the mapping of this stage's rows to themselves
    positions: Tensor
    slots: Tensor | None = None  # int64: the cache's rows that the chunk's go to; below 0: none
    keys: Keys | None = None  # where the keys lie in it; None: they are the chunk's own rows


def passes_of(plan: CompressionPlan, cache: KVCache | None, phase: Phase) -> list[StagePass]:
    """A plan's stages, over its chunk. Raises as `StageCache.begin`."""
    passes = []
    for s, stage in enumerate(plan.stages):
        slots, keys = (None, None) if cache is None else cache.stages[s].begin(stage, phase)
        layers, same = plan.schedule.layers_of_stage(s), plan.between(s, s)
        passes.append(StagePass(layers, stage, same, stage.positions, slots, keys))
    return passes


class StageCache:
    """K and V of one stage's layers.

    Each layer has `k[i]` and `v[i]`, [total_capacity, H_kv, D]; sequence b owns `capacities[b]` of
    their rows, behind those of the sequences before it, and has filled the first `lens[b]`.
    `gone[b]` are the numbers of the rows that were cached and then compacted away.
    """

    def __init__(
        self,
        layers: range,
        num_sequences: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = layers
        self.lens: tuple[int, ...] = (0,) * num_sequences
        self.capacities: tuple[int, ...] = (0,) * num_sequences
        self.gone = [np.empty(0, np.int64)] * num_sequences
        empty = (0, num_kv_heads, head_dim)
        self.k = [torch.empty(empty, dtype=dtype, device=device) for _ in layers]
        self.v = [torch.empty(empty, dtype=dtype, device=device) for _ in layers]
        self._device = device

    @property
    def starts(self) -> tuple[int, ...]:
        """What each sequence's rows are counted from, and the end of all, [B + 1]."""
        return (0, *accumulate(self.capacities))

    @property
    def allocated_bytes(self) -> int:
        """What the K and V of all its layers occupy, read off their storages."""
        return sum(t.untyped_storage().nbytes() for t in (*self.k, *self.v))

    @property
    def filled_bytes(self) -> int:
        """What the rows in use occupy of that."""
        rows = max(sum(self.capacities), 1)
        return self.allocated_bytes // rows * sum(self.lens)

    def left(self, rows: Sequence[int]) -> tuple[int, ...]:
        """How many of each sequence's rows are left of those that a plan counts."""
        return tuple(n - len(gone) for n, gone in zip(rows, self.gone, strict=True))

    def fit(self, needed: Sequence[int]) -> None:
        """Make room for exactly `needed[b]` rows of each sequence, by a new allocation.

        Layer by layer, so that at most one tensor exists twice.
        """
        self._check_room(needed)
        if tuple(needed) == self.capacities:
            return
        for tensors in (self.k, self.v):
            for i, old in enumerate(tensors):
                new = old.new_empty((sum(needed), *old.shape[1:]))
                src = dst = 0
                for length, had, has in zip(self.lens, self.capacities, needed, strict=True):
                    new[dst : dst + length] = old[src : src + length]
                    src, dst = src + had, dst + has
                tensors[i] = new
        self.capacities = tuple(needed)

    def _check_room(self, needed: Sequence[int]) -> None:
        if any(n < length for n, length in zip(needed, self.lens, strict=True)):
            raise ValueError(f"needed: expected at least the cached {self.lens}, got {needed}")

    def begin(self, stage: StagePlan, phase: Phase) -> tuple[Tensor, Keys | None]:
        """`StagePass.slots` and `keys` of a chunk.

        Raises: ValueError where the plan was made for other cached lengths, or there is no room.
        """
        cached, kv_lens = self.left(stage.cached_lens), self.left(stage.kv_lens)
        if cached != self.lens:
            raise ValueError(f"stage: expected {self.lens} cached rows, got {cached}")
        if any(n > c for n, c in zip(kv_lens, self.capacities, strict=True)):
            raise ValueError(f"stage: expected room for {kv_lens}, got {self.capacities}")
        spans = zip(cached, kv_lens, strict=True)
        rows = [self.slots(b, begin, end) for b, (begin, end) in enumerate(spans)]
        slots = to_device(np.concatenate([*rows, np.empty(0, np.int64)]), self._device)
        return slots, None if phase is Phase.PREFILL else self.keys(stage, kv_lens)

    def slots(self, b: int, begin: int, end: int) -> np.ndarray:
        """The rows of `k[i]` and `v[i]` that rows begin .. end of sequence b are."""
        return np.arange(begin, end) + self.starts[b]

    def keys(self, stage: StagePlan, lens: Sequence[int]) -> Keys:
        """Where attention finds the first `lens[b]` rows of each sequence."""
        return CachedKeys.build(stage.seq_lens, lens, self.capacities, self._device)

    def compact(self, mapping: StagePlan) -> None:
        """Drop what `mapping` drops, in every layer, and give the memory back.

        Its source rows are the last ones cached of each sequence; what lies before them stays.
        """
        prefix = tuple(n - new for n, new in zip(self.lens, mapping.seq_lens_in, strict=True))
        lens = self._move(mapping, prefix)
        kept = np.zeros(mapping.num_tokens_in, bool)
        kept[mapping.source_rows()] = True
        first = 0
        for b, rows in enumerate(mapping.seq_lens_in):
            dropped = prefix[b] + np.flatnonzero(~kept[first : first + rows])
            self.gone[b] = np.union1d(self.gone[b], self.present(b)[dropped])
            first += rows
        self.lens = lens
        self.fit(self.lens)

    def _move(self, mapping: StagePlan, prefix: tuple[int, ...]) -> tuple[int, ...]:
        """`compact`, of the rows; returns how many are left of each sequence."""
        result = ops.compact_kv_(
            self.k, self.v, mapping, self.starts, prefix_lens=prefix, seq_lens=self.lens
        )
        return result.seq_lens.host

    def present(self, b: int) -> np.ndarray:
        """The number, as a plan counts, of every row that the cache holds of sequence b."""
        rows = np.arange(self.lens[b] + len(self.gone[b]))
        return np.delete(rows, self.gone[b])


class KVCache:
    """One StageCache per stage of a schedule; of blocks where a block size is given."""

    def __init__(
        self,
        schedule: CompressionSchedule,
        num_sequences: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        block_size: int | None = None,
    ) -> None:
        """block_size: rows of a block, for a paged cache; None: a sequence's rows lie together."""
        self.schedule, self.block_size = schedule, block_size
        make: Callable[..., StageCache] = StageCache
        if block_size is not None:
            from adsc_kernels.paged_cache import PagedStageCache  # which is a StageCache

            checks.integer("block_size", block_size, 1)
            make = partial(PagedStageCache, block_size=block_size)
        form = (num_sequences, num_kv_heads, head_dim, dtype, torch.device(device))
        layers = map(schedule.layers_of_stage, range(schedule.num_stages))
        self.stages = tuple(make(some, *form) for some in layers)

    @property
    def device(self) -> torch.device:
        """Where its rows are."""
        return self.stages[0]._device

    def fit(self, plan: CompressionPlan, extra: int = 0) -> None:
        """Room in every stage for exactly what `plan` will have cached, and `extra` rows more."""
        for cache, stage in zip(self.stages, plan.stages, strict=True):
            cache.fit([n + extra for n in cache.left(stage.kv_lens)])

    @property
    def dtype(self) -> torch.dtype:
        """Of its rows."""
        return self.stages[-1].k[0].dtype

    @property
    def layers(self) -> list[LayerRows]:
        """K and V of each layer."""
        pairs = (zip(stage.k, stage.v, strict=True) for stage in self.stages)
        return [LayerRows(k, v) for stage in pairs for k, v in stage]

    def at(self, addresses: Tensor) -> list[LayerRows]:
        """The same of any cache of this form, by its addresses."""
        return [LayerRows(k, v, a) for (k, v, _), a in zip(self.layers, addresses, strict=True)]

    @property
    def form(self) -> tuple[Hashable, ...]:
        """Equal for caches that one program writes and reads, wherever their rows lie."""
        rows = self.stages[-1].k[0]
        return (self.schedule, self.block_size, *rows.shape[1:], rows.dtype, rows.device)

    def addresses(self) -> Tensor:
        """Where each layer's K and V begin, int64 [layers, 2] on the device: until the next `fit`
        or compaction."""
        found = [(rows.k.data_ptr(), rows.v.data_ptr()) for rows in self.layers]
        return to_device(np.array(found, np.int64), self.device)

    def advance(self, plan: CompressionPlan) -> None:
        """The plan's chunk has been written in every layer: it now counts as cached."""
        for cache, stage in zip(self.stages, plan.stages, strict=True):
            cache.lens = cache.left(stage.kv_lens)

    def compact_early_layers(self, plan: CompressionPlan) -> None:
        """Leave the layers before the first boundary only what stays behind it of plan's chunk.

        The chunk must be what was cached last. Does nothing where there are no such layers.
        """
        if len(plan.stages) > 1 and self.stages[0].layers:
            self.stages[0].compact(plan.stages[1])

    def compact_spans(
        self, plan: CompressionPlan, spans: Sequence[tuple[int, ...]], keep: str
    ) -> None:
        """Keep a share of what is left of each span in every layer, spread evenly over it.

        plan: of everything cached, as if run at once. spans: (sequence, start, length, ...) in it.
        """
        schedule = CompressionSchedule.parse(f"0:{keep}", 1)
        firsts = (0, *accumulate(plan.stages[0].seq_lens))
        for s, cache in enumerate(self.stages):
            if not cache.layers:
                continue
            tokens = plan.between(0, s).source_rows()
            starts = (0, *accumulate(plan.stages[s].seq_lens))
            left = []
            for b, start, length, *_ in spans:
                ends = np.array([start, start + length]) + firsts[b]
                rows = np.searchsorted(tokens, ends) - starts[b]
                begin, end = np.searchsorted(cache.present(b), rows)
                left.append((b, int(begin), int(end - begin)))
            layout = ([0, *accumulate(cache.lens)], left)
            cache.compact(make_plan(schedule, *layout, cache._device).stages[1])

    @property
    def bytes_per_stage(self) -> tuple[int, ...]:
        """Bytes allocated for each stage, read off the storages."""
        return tuple(stage.allocated_bytes for stage in self.stages)

    @property
    def filled_bytes_per_stage(self) -> tuple[int, ...]:
        """The same of the rows in use."""
        return tuple(stage.filled_bytes for stage in self.stages)
