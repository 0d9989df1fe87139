# mypy: allow-untyped-defs, allow-incomplete-defs
"""A boundary's step and the compaction of caches written before it: the launches of the two ops."""

import torch
from torch import Tensor

from adsc_kernels.kv.tensors import Places
from adsc_kernels.triton.boundary_step import write_boundary_step
from adsc_kernels.triton.compact import compact_kv_, compact_paged_kv_


def compress_step(*arguments, places: Places | None = None) -> tuple[Tensor, ...]:
    """See `adsc_kernels.ops.compress_step`; arguments: those of its schema. places: as in
    `compact_kv_`.

    One launch for the boundary, then those of the compaction. A program of both would be compiled
    anew for every geometry of caches beside every shape of rows.
    """
    boundary, compaction, outs = arguments[:13], arguments[13:-1], arguments[-1]
    caches, num_layers, *paged, seq_starts, edit_table, blocks, cache_layout = compaction
    block_table, _, *rows = paged
    write_boundary_step(outs, *boundary)
    if block_table is not None:
        given = (caches, num_layers, *paged, edit_table, blocks, cache_layout)
        return compact_paged_kv_(*given, places=places)
    given = (caches, num_layers, *rows, seq_starts, cache_layout)
    none = (torch.empty(0, dtype=torch.int32, device=caches[0].device) for _ in range(3))
    return (*compact_kv_(*given, places=places), *none)
