# mypy: allow-untyped-defs, allow-incomplete-defs
"""A boundary's step and the compaction of caches written before it: the launches of the two ops."""

import torch
from torch import Tensor

from adsc_kernels import fakes
from adsc_kernels.triton.boundary_step import write_boundary_step
from adsc_kernels.triton.compact import compact_kv_, compact_paged_kv_


def compress_step(*arguments) -> tuple[Tensor, ...]:
    """See `adsc_kernels.ops.compress_step`.

    One launch for the boundary, then those of the compaction. A program of both would be compiled
    anew for every geometry of caches beside every shape of rows.
    """
    boundary, compaction, outs = arguments[:13], arguments[13:-1], arguments[-1]
    caches, num_layers, block_table, block_size, *_ = compaction
    rows, (seq_starts, *paged, layout) = compaction[4:10], compaction[10:]
    _check_outs(outs, boundary)
    write_boundary_step(outs, *boundary)
    if block_table is not None:
        given = (caches, num_layers, block_table, block_size, *rows, *paged, layout)
        return compact_paged_kv_(*given)
    given = (caches, num_layers, *rows, seq_starts, layout)
    none = (torch.empty(0, dtype=torch.int32, device=caches[0].device) for _ in range(3))
    return (*compact_kv_(*given), *none)


def _check_outs(outs, boundary) -> None:
    def described(x):
        if isinstance(x, list):
            return [described(part) for part in x]
        return x.to("meta") if isinstance(x, Tensor) else x

    wanted = fakes.boundary_step(*map(described, boundary))
    if len(outs) != len(wanted):
        raise ValueError(f"outs: expected {len(wanted)} tensors, got {len(outs)}")
    for i, (x, like) in enumerate(zip(outs, wanted, strict=True)):
        if x.shape != like.shape or x.dtype != like.dtype or not x.is_contiguous():
            raise ValueError(
                f"outs[{i}]: expected contiguous {like.dtype} of shape {tuple(like.shape)}, got "
                f"{x.dtype} of shape {tuple(x.shape)} with strides {x.stride()}"
            )
