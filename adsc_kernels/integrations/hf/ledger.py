"""A transformers cache that knows what each stage dropped: which tokens its columns hold.

Which tokens were dropped can't be told from the keys and values, so the cache carries it: it goes
where they go, through beams, crops, copies and a second turn. A pass without pictures adds the same
columns to every stage and changes nothing here; so a decode step costs nothing on the host.
"""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache, StaticLayer

from adsc_kernels.errors import UnsupportedError
from adsc_kernels.integrations.hf.compat import writes_where_told
from adsc_kernels.schedule import CompressionSchedule


class Ledger:
    """What the cache of each stage holds, up to the last pass that had pictures.

    Attributes:
        stages: the stage of each layer.
        length: columns of stage 0 that are told of; behind them all stages hold the same.
        columns: for each stage int64 [B, n_s] on the device: the column of stage 0 that each
            cached column is, -1 for padding.
        is_full: for each stage, nothing has been dropped in it.
        has_padding: for each stage, some of its columns are padding.
        behind: for each stage int64 [B, length] on the device, how far the positions of what
            follows each column of stage 0 have moved up; under renumbered positions only.
        shifts: for each stage int64 [B, 1], the last of these.
    """

    def __init__(self, schedule: CompressionSchedule) -> None:
        self.schedule = schedule
        self.stages = [schedule.stage_of_layer(n) for n in range(schedule.num_layers)]
        self.clear()

    def clear(self) -> None:
        """Nothing is cached."""
        self.length = 0
        self.columns: list[Tensor] = []
        self.is_full = [True] * self.schedule.num_stages
        self.has_padding = [False] * self.schedule.num_stages
        self.behind: list[Tensor] = []
        self.shifts: list[Tensor] = []

    def missing(self, stage: int) -> int:
        """How many columns stage 0 has more than this one."""
        return self.length - self.columns[stage].shape[1] if self.length else 0

    def real(self, stage: int, attention_mask: Tensor | None, total: int) -> Tensor | None:
        """The 2D mask of a stage's first `total` cached columns, of that of stage 0.

        bool [B, total], or None where no column is padding.
        """
        if not self.length:
            return None if attention_mask is None else attention_mask[:, :total].bool()
        if attention_mask is None and not self.has_padding[stage]:
            return None
        columns = self.columns[stage]
        known, rest = columns >= 0, total - columns.shape[1]
        if attention_mask is None:
            return torch.cat([known, known.new_ones((len(known), rest))], 1)
        mask = attention_mask.to(known.device).bool()
        known = known & mask.gather(1, columns.clamp(min=0))
        return torch.cat([known, mask[:, self.length : self.length + rest]], 1)

    def shift(self, stage: int) -> Tensor | None:
        """How far what comes next has moved up in a stage, [B, 1]; None where nothing has."""
        return self.shifts[stage] if self.shifts else None

    def moved_on(self, stage: int, seen: int, moved: Tensor) -> Tensor:
        """`behind` of a stage to which a pass is added behind `seen` columns, from [B, S] of that
        pass alone."""
        if not seen:
            return moved
        shift = self.shift(stage)
        shift = moved.new_zeros((len(moved), 1)) if shift is None else shift
        tail = shift.expand(-1, seen - self.length)
        return torch.cat([*self.behind[stage : stage + 1], tail, shift + moved], 1)

    def extended(
        self,
        length: int,
        columns: list[Tensor],
        behind: list[Tensor],
        is_full: list[bool],
        padding: list[bool],
    ) -> Ledger:
        """That of a cache to which a pass with pictures has been added.

        length: columns of stage 0 then. columns: [B, n] of each stage, all that it then holds.
        behind: of each stage, or none. is_full, padding: for each stage, of the pass.
        """
        after = copy(self)
        after.length, after.columns, after.behind = length, columns, behind
        after.is_full = [a and b for a, b in zip(self.is_full, is_full, strict=True)]
        after.has_padding = [a or b for a, b in zip(self.has_padding, padding, strict=True)]
        after._settle()
        return after

    def _settle(self) -> None:
        """Copies, so that a compiled step depends on no prompt's length."""
        self.shifts = [table[:, -1:].contiguous() for table in self.behind] if self.length else []

    def select(self, change: Any) -> None:
        """Apply `change` to the rows of every stage."""
        self.columns = [change(table) for table in self.columns]
        self.behind = [change(table) for table in self.behind]
        self._settle()

    def crop(self, length: int) -> list[int]:
        """Forget what lies behind the first `length` columns of stage 0.

        Returns how many columns each stage still has of what was told of. Reads the tables.
        """
        kept = []
        for stage, table in enumerate(self.columns):
            table = torch.where(table < length, table, -1)
            used = (table >= 0).any(0).nonzero()
            kept.append(int(used[-1]) + 1 if len(used) else 0)
            self.columns[stage] = table[:, : kept[-1]]
            self.has_padding[stage] = bool((self.columns[stage] < 0).any())
        self.length = length
        self.behind = [table[:, :length] for table in self.behind]
        self._settle()
        return kept


class StagedCache(Cache):
    """What a cache does besides once a patched model has used it."""

    ledger: Ledger
    full_lengths: list[int]  # of a static cache's layers, as they were asked for

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """For layer 0 the length of the conversation, though a boundary there drops some of it."""
        length = super().get_seq_length(layer_idx)
        stage = self.ledger.stages[0]
        return length + self.ledger.missing(stage) if layer_idx == 0 and stage else length

    def reset(self) -> None:
        super().reset()
        self.ledger.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.ledger.select(lambda table: table.index_select(0, beam_idx.to(table.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.ledger.select(partial(torch.repeat_interleave, repeats=repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.ledger.select(lambda table: table[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Each stage loses what it has of the conversation's last tokens: `-n` removes n of them.

        A positive number is the length that is left, as transformers' first 5.x releases have it.
        """
        ledger = self.ledger
        seen = int(self.get_seq_length()) if tokens_to_remove > 0 or ledger.length else 0
        if tokens_to_remove > 0:
            tokens_to_remove -= seen
            if tokens_to_remove >= 0:
                return
        if not ledger.length or seen + tokens_to_remove >= ledger.length:
            super().crop(tokens_to_remove)
            return
        behind = seen - ledger.length
        before = [table.shape[1] for table in ledger.columns]
        after = ledger.crop(seen + tokens_to_remove)
        for layer_idx, layer in enumerate(self.layers):
            stage = ledger.stages[layer_idx]
            layer.crop(after[stage] - before[stage] - behind)


class StagedDynamicCache(StagedCache, DynamicCache):
    """A DynamicCache, offloaded or not, with layers that slide or not."""


class StagedStaticCache(StagedCache, StaticCache):
    """A StaticCache; its later stages are allocated as short as they will be."""


STAGED: dict[type, type] = {DynamicCache: StagedDynamicCache, StaticCache: StagedStaticCache}


def stage_cache(cache: Cache, schedule: CompressionSchedule) -> StagedCache:
    """The same object, which from now on keeps a ledger.

    Raises UnsupportedError for a kind of cache that can't, ValueError for one that holds what was
    run without this schedule.
    """
    if isinstance(cache, StagedCache):
        known = cache.ledger.schedule
        if known is not schedule and known != schedule:  # Dynamo can't compare their integers
            got = f"one of {known!s}"
            raise ValueError(f"cache: expected one of the schedule {schedule!s}, got {got}")
        _check_lengths(cache)
        return cache
    if type(cache) not in STAGED:
        kinds = " or ".join(kind.__name__ for kind in STAGED)
        raise UnsupportedError(f"cache: expected a {kinds}, got {type(cache).__name__}")
    if isinstance(cache, StaticCache) and writes_where_told():
        got = f"a StaticCache with transformers {transformers.__version__}"
        raise UnsupportedError(f"cache: expected one that counts its own columns, got {got}")
    if any(layer.keys is not None and layer.keys.numel() for layer in cache.layers):
        raise ValueError(
            "cache: expected an empty one, or one that this patched model has filled; got one "
            "filled without apply_adsc"
        )
    cache.__class__ = STAGED[type(cache)]
    cache.ledger = Ledger(schedule)
    cache.full_lengths = [getattr(layer, "max_cache_len", 0) for layer in cache.layers]
    return cache


def new_cache(config: Any, schedule: CompressionSchedule) -> StagedCache:
    """What the decoder of that config would make. Dynamo breaks the graph where an object changes
    its class, not here."""
    cache = StagedDynamicCache(config=config)
    cache.ledger = Ledger(schedule)
    return cache


def _check_lengths(cache: StagedCache) -> None:
    """Who evicts from a cache (kvpress) does it behind the ledger: masks and positions would lie.

    A static cache's lengths are on the device, so they go unasked.
    """
    ledger = cache.ledger
    if not ledger.length or isinstance(cache, StaticCache):
        return
    told = [table.shape[1] for table in ledger.columns]
    lengths = [int(layer.get_seq_length()) for layer in cache.layers]
    stages = ledger.stages[: len(lengths)]
    behind = {length - told[stage] for length, stage in zip(lengths, stages, strict=True)}
    if len(behind) != 1 or min(behind) < 0:
        raise ValueError(
            f"cache: expected layers that hold {[told[stage] for stage in stages]} rows and what "
            f"came behind, got {lengths}; was something evicted, or a call interrupted?"
        )


def shorten(cache: StagedCache, missing: list[int]) -> None:
    """Allocate the layers of later stages that much shorter, where they aren't allocated yet."""
    for layer_idx, layer in enumerate(cache.layers):
        stage = cache.ledger.stages[layer_idx]
        if type(layer) is StaticLayer and not layer.is_initialized:
            layer.max_cache_len = cache.full_lengths[layer_idx] - missing[stage]


def view(cache: StagedCache, stage: int) -> Cache:
    """The layers of one stage as a cache of their own, for those who ask about its lengths."""
    layers = cache.ledger.schedule.layers_of_stage(stage)
    return Cache(layers=cache.layers[layers.start : layers.stop])
