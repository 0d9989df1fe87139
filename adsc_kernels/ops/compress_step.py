"""A boundary's step and the compaction of caches written before it, in one launch."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adsc_kernels import reference
from adsc_kernels.compaction import CompactionResult
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.ops._cache import CacheStage, IntsLike, check_apart
from adsc_kernels.ops._dispatch import Stage, choose, register
from adsc_kernels.ops.boundary import (
    BoundaryStep,
    Layout,
    check_boundary,
    empty_outputs,
    step_of,
)
from adsc_kernels.ops.compact import Blocks, CompactionCall, check_dense, check_paged


@dataclass(frozen=True, eq=False)
class DenseCache:
    """The caches of layers in front of a boundary: the arguments of `compact_kv_`, by its names.

    stage: with neither it nor keep_indices the boundary's own: the layers of the stage before.
    """

    k_caches: Tensor | Sequence[Tensor]
    v_caches: Tensor | Sequence[Tensor] | None
    stage: CacheStage | None = None
    seq_starts: IntsLike | None = None
    _: KW_ONLY
    layout: str = "NHD"
    keep_indices: Tensor | None = None
    cu_kept: IntsLike | None = None
    cu_rows: IntsLike | None = None
    prefix_lens: IntsLike | None = None
    seq_lens: IntsLike | None = None
    k_scales: Tensor | Sequence[Tensor] | None = None
    v_scales: Tensor | Sequence[Tensor] | None = None


@dataclass(frozen=True, eq=False)
class PagedCache:
    """The same of a paged cache: the arguments of `compact_paged_kv_`, by its names.

    stage: with neither it nor keep_indices the boundary's own: the layers of the stage before.
    """

    k_caches: Tensor | Sequence[Tensor]
    v_caches: Tensor | Sequence[Tensor] | None
    block_table: Tensor
    stage: CacheStage | None = None
    block_size: int | None = None
    _: KW_ONLY
    layout: str = "NHD"
    keep_indices: Tensor | None = None
    cu_kept: IntsLike | None = None
    cu_rows: IntsLike | None = None
    prefix_lens: IntsLike | None = None
    seq_lens: IntsLike | None = None
    edit_table: bool = False
    block_table_host: Tensor | np.ndarray | None = None
    pinned: Blocks | None = None
    k_scales: Tensor | Sequence[Tensor] | None = None
    v_scales: Tensor | Sequence[Tensor] | None = None


class CompressStep(NamedTuple):
    """What `boundary_step` returns, and what the compaction op does."""

    boundary: BoundaryStep
    compaction: CompactionResult


def compress_step(
    hidden: Tensor,
    cache: DenseCache | PagedCache,
    stage: Stage | None = None,
    *,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    others: Sequence[Tensor] = (),
    keep_indices: Tensor | None = None,
    layout: Layout | None = None,
) -> CompressStep:
    """`boundary_step`, and `compact_kv_` or `compact_paged_kv_` of the layers in front of the
    boundary, in one launch on CUDA (more than 16 tensors of rows or 64 of caches: a few more).

    hidden, stage, residual, weight, eps, others, keep_indices, layout: as for `boundary_step`.
    cache: what is compacted, in place: a `DenseCache` or a `PagedCache`. Its rows are those of an
      earlier stage, so its own stage is the way from there, such as `plan.between(0, s)` for
      layers of stage 0 at boundary s. Where it names neither a stage nor keep_indices, it takes the
      boundary's stage, which then must be a StagePlan. (The boundary's keep_indices count in the
      batch, a cache's within its sequences, so they never stand for one another.) None of its
      tensors may share memory with hidden, residual, weight or others (not checked under
      torch.compile).
    Returns `CompressStep`: .boundary and .compaction.

    For inference: no gradient flows through it, and an input that needs one is refused.

    Raises what the two ops raise, before anything is moved, written or launched; UnsupportedError
    for a layout with a cache that names no rows of its own, since the results of a compaction are
    known on the host and a layout isn't. What the two check on a device with ADSC_CHECK=1 is
    checked in front of the one launch.
    """
    others = list(others)
    arguments = check_boundary(hidden, stage, residual, weight, eps, others, keep_indices, layout)
    compaction = _check_cache(cache, stage, layout)
    names = ["hidden", "residual", "weight", *(f"others[{i}]" for i in range(len(others)))]
    inputs = [
        (name, x)
        for name, x in zip(names, (hidden, residual, weight, *others), strict=True)
        if x is not None
    ]
    for name, x in inputs:
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected a tensor that needs no gradient (boundary_step gives one)"
            )
    if compaction.device != hidden.device:
        raise ValueError(
            f"k_caches[0]: expected the device of hidden, {hidden.device}, got {compaction.device}"
        )
    check_apart(inputs, compaction.caches.reaches)
    op = choose("compress_step", hidden.device)
    if op is None:
        step, results = reference.compress_step(
            hidden,
            compaction,
            stage,
            residual=residual,
            weight=weight,
            eps=eps,
            others=others,
            keep_indices=keep_indices,
            layout=layout,
        )
        outputs = [x for x in (step[0], step[1], *step[2], *(step[3] or ())) if x is not None]
    else:
        outputs = empty_outputs(*arguments)
        results = op(*arguments, *_op_arguments(compaction), outputs)
    return CompressStep(
        step_of(outputs, residual is not None, len(others)),
        compaction.result(*(results if compaction.paged else results[:2])),
    )


def _check_cache(
    cache: DenseCache | PagedCache, stage: Stage | None, layout: Layout | None
) -> CompactionCall:
    if not isinstance(cache, DenseCache | PagedCache):
        raise TypeError(f"cache: expected a DenseCache or a PagedCache, got {type(cache).__name__}")
    own: Any = cache.stage
    if own is None and cache.keep_indices is None:
        if layout is not None:
            raise UnsupportedError(
                "layout: the rows of a cache can't come from it; expected a stage or keep_indices "
                "in cache, got neither"
            )
        if stage is None:
            raise ValueError(
                "cache: expected a stage or keep_indices of its own with keep_indices, got neither"
            )
        if not hasattr(stage, "cu_seqlens_in"):
            raise TypeError(
                "stage: expected a StagePlan, which says whose rows are whose, or one in cache, "
                f"got {type(stage).__name__}"
            )
        own = stage
    arguments = {f.name: getattr(cache, f.name) for f in fields(cache)} | {"stage": own}
    return (check_dense if isinstance(cache, DenseCache) else check_paged)(**arguments)


def _op_arguments(call: CompactionCall) -> tuple[Any, ...]:
    """Those of one of the compaction ops as this op's."""
    if call.paged:
        caches, layers, table, size, *rows, edit_table, pinned, layout = call.arguments
        return (caches, layers, table, size, *rows, None, edit_table, pinned, layout)
    caches, layers, *rows, seq_starts, layout = call.arguments
    return (caches, layers, None, 0, *rows, seq_starts, False, None, layout)


# ---- Schema and shapes for tracing ----


def _fake(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    others: list[Tensor],
    segments: Tensor | None,
    keep_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    spans: Tensor | None,
    keep: list[int],
    pattern: str,
    max_height: int,
    num_tokens: int,
    caches: list[Tensor],
    num_layers: int,
    block_table: Tensor | None,
    block_size: int,
    cache_segments: Tensor | None,
    cache_keep_indices: Tensor | None,
    cu_kept: Tensor,
    cu_rows: Tensor | None,
    prefix_lens: Tensor | None,
    seq_lens: Tensor | None,
    seq_starts: Tensor | None,
    edit_table: bool,
    pinned: Tensor | None,
    layout: str,
    outs: list[Tensor],
) -> tuple[Tensor, ...]:
    batch = cu_kept.shape[0] - 1
    lens = cu_kept.new_empty(batch, dtype=torch.int32)
    slots = cu_kept.new_empty(batch, dtype=torch.int64)
    if block_table is None:
        return (lens, slots, *(cu_kept.new_empty(0, dtype=torch.int32) for _ in range(3)))
    return (
        lens,
        slots,
        cu_kept.new_empty(batch, dtype=torch.int32),
        cu_kept.new_empty(batch + 1, dtype=torch.int32),
        block_table.new_empty(block_table.shape if edit_table else (0, 0)),
    )


register(
    "compress_step",
    "(Tensor hidden, Tensor? residual, Tensor? weight, float eps, Tensor[] others, "
    "Tensor? segments, Tensor? keep_indices, Tensor? cu_seqlens, Tensor? spans, int[] keep, "
    "str pattern, SymInt max_height, SymInt num_tokens, Tensor(a!)[] caches, int num_layers, "
    "Tensor? block_table, SymInt block_size, Tensor? cache_segments, Tensor? cache_keep_indices, "
    "Tensor cu_kept, Tensor? cu_rows, Tensor? prefix_lens, Tensor? seq_lens, Tensor? seq_starts, "
    "bool edit_table, Tensor? read_only_blocks, str cache_layout, Tensor(b!)[] outs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    triton="compress_step",
)
