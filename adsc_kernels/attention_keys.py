"""Where attention finds its queries and keys: in packed rows, in a cache, or in one of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adsc_kernels.plan import to_device


class Rows(Protocol):
    """What attention asks of a stage: where each sequence's query rows lie."""

    @property
    def cu_seqlens(self) -> Tensor: ...

    @property
    def seq_lens(self) -> tuple[int, ...]: ...

    @property
    def max_seqlen(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...


@dataclass(frozen=True)
class CachedKeys:
    """Where each sequence's keys lie: rows starts[b] .. starts[b] + lens[b] of a cache.

    The varlen kernels know cumulative lengths, but no unused capacity. So the gap behind each
    sequence's keys is told to them as one more sequence, of keys that no query row asks for:
    `cu_seqlens_q` and `cu_seqlens_k` (int32, [2B + 1]) list sequence, gap, sequence, gap ...
    address: int64 [2] on the device, where the cache of the call lies in place of k and v, which
    then only show its form: for a graph, which is to serve other caches too.
    """

    starts: tuple[int, ...]
    lens: tuple[int, ...]
    max_len: int
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    address: Tensor | None = None

    @classmethod
    def build(
        cls,
        q_lens: Sequence[int],
        lens: Sequence[int],
        capacities: Sequence[int],
        device: torch.device,
    ) -> CachedKeys:
        """Of each sequence its query rows, its keys, and the cache rows that it owns.

        Raises ValueError where these don't fit together, as a cache of ``lens`` above
        ``capacities``.
        """
        if not len(q_lens) == len(lens) == len(capacities):
            got = f"{len(q_lens)}, {len(lens)} and {len(capacities)}"
            raise ValueError(f"q_lens, lens, capacities: expected one for each sequence, got {got}")
        for rows, length, capacity in zip(q_lens, lens, capacities, strict=True):
            if rows < 0 or not 0 <= length <= capacity:
                got = f"q_lens {rows}, lens {length}, capacities {capacity}"
                raise ValueError(f"lens: expected 0 <= lens <= capacities, got {got}")
        starts: list[int] = []
        cu_q, cu_k = [0], [0]
        for rows, length, capacity in zip(q_lens, lens, capacities, strict=True):
            starts.append(cu_k[-1])
            cu_q += [cu_q[-1] + rows] * 2
            cu_k += [starts[-1] + length, starts[-1] + capacity]
        both = to_device(np.array([cu_q, cu_k], np.int32), device)
        return cls(tuple(starts), tuple(lens), max(lens, default=0), both[0], both[1])


@dataclass(frozen=True)
class PagedKeys:
    """Where each sequence's keys lie in a cache of blocks: row r of sequence b is row
    `r % block_size` of block `block_table[b, r // block_size]`.

    block_table: int32 [B, blocks] on the device, whatever behind a sequence's own blocks.
    bounds: int32 [2B + 1], for each sequence 0 and its keys. The others as of `CachedKeys`.
    """

    lens: tuple[int, ...]
    max_len: int
    block_size: int
    block_table: Tensor
    bounds: Tensor
    address: Tensor | None = None

    @classmethod
    def build(
        cls, lens: Sequence[int], block_size: int, block_table: np.ndarray, device: torch.device
    ) -> PagedKeys:
        """Of each sequence its keys and its row of the table."""
        bounds = np.zeros(2 * len(lens) + 1, np.int32)
        bounds[1::2] = lens
        tables = to_device(block_table, device), to_device(bounds, device)
        return cls(tuple(lens), max(lens, default=0), block_size, *tables)

    @cached_property
    def cu_seqlens_k(self) -> Tensor:
        """int32 [B + 1], the keys of the sequences before."""
        return F.pad(self.bounds[1::2].cumsum(0, dtype=torch.int32), (1, 0))

    def in_blocks(self, rows: Tensor) -> Tensor:
        """A cache's rows, as `in_blocks`."""
        return in_blocks(rows, self.block_size)


def in_blocks(rows: Tensor, block_size: int) -> Tensor:
    """[blocks * block_size, H, D] as [blocks, block_size, H, D]."""
    return rows.unflatten(0, (len(rows) // block_size, block_size))


Keys = CachedKeys | PagedKeys
