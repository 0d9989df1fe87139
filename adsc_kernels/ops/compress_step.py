"""A boundary's step and the compaction of caches written before it, in one launch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from adsc_kernels import fakes
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.kv.cache import CacheStage, DenseCache, PagedCache
from adsc_kernels.kv.check import CompactionCall, check_dense, check_paged
from adsc_kernels.kv.overlap import check_apart
from adsc_kernels.kv.pages import CompactionResult
from adsc_kernels.kv.tensors import has_place
from adsc_kernels.ops._dispatch import (
    asks_gradient,
    call_in_place,
    choose,
    explain,
    native,
    register,
)
from adsc_kernels.ops.boundary_step import (
    BatchLayout,
    BoundaryStep,
    boundary_arguments,
    check_boundary,
    step_of,
)
from adsc_kernels.ops.downsample_add_rms_norm import is_usual_eps
from adsc_kernels.rows import Stage, list_of


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
    layout: BatchLayout | None = None,
) -> CompressStep:
    """`boundary_step`, and `compact_kv_` or `compact_paged_kv_` of the layers in front of the
    boundary, in one launch on CUDA. More take: what takes more in `boundary_step`; over 64
    tensors of caches.

    hidden, stage, residual, weight, eps, others, keep_indices, layout: as for `boundary_step`.
    cache: what is compacted, in place: a `DenseCache` or a `PagedCache`, such as an adapter of
      `integrations.layouts` gives, with all that is to be said of it. Its rows are those of an
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
    others = list_of(others, "others")
    given = (hidden, cache, stage, residual, weight, eps, others, keep_indices, layout)
    op = native("compress_step", hidden) if is_usual_eps(eps) else None
    if op is None:
        arguments, compaction = _check(*given)
        outputs = fakes.boundary_step(*arguments)
        chosen = choose("compress_step", hidden.device)
        both = (*arguments, *compaction.arguments(of_step=True), outputs)
        caches = compaction.caches
        results = call_in_place(chosen, *both, written=caches.tensors, places=caches.places)
    else:
        outputs, results, compaction = _call(op, *given)
        increment_version(compaction.caches.tensors)
    return CompressStep(
        step_of(outputs, residual is not None, len(others), layout is not None),
        compaction.result(*(results[:2] if compaction.paged is None else results)),
    )


def _call(
    op: tuple[Callable[..., Any], ...], hidden: Tensor, cache: DenseCache | PagedCache, *given: Any
) -> tuple[list[Tensor], list[Tensor], CompactionCall]:
    """What a native op returns, which checks what it is told of."""
    try:
        arguments, compaction = _usual_arguments(hidden, cache, *given)
        both = (*arguments, *compaction.arguments(of_step=True))
        return *op[compaction.caches.number is not None](*both), compaction
    except Exception as error:
        if not isinstance(cache, DenseCache | PagedCache) or not cache.forget():
            explain(error, _check, hidden, cache, *given)
    return _call(op, hidden, cache, *given)


def _usual_arguments(
    hidden: Tensor,
    cache: DenseCache | PagedCache,
    stage: Stage | None,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    others: list[Tensor],
    keep_indices: Tensor | None,
    layout: BatchLayout | None,
) -> tuple[tuple[Any, ...], CompactionCall]:
    """Those of the boundary and the cache's, for a native op: it checks what it is told of."""
    if asks_gradient(hidden, residual, weight, *others):
        raise ValueError("hidden: expected tensors that need no gradient")
    rows = (hidden, stage, residual, weight, eps, others, keep_indices, layout)
    return boundary_arguments(*rows), _check_cache(cache, stage, layout, native=True)


def _check(
    hidden: Tensor,
    cache: DenseCache | PagedCache,
    stage: Stage | None,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    others: list[Tensor],
    keep_indices: Tensor | None,
    layout: BatchLayout | None,
) -> tuple[tuple[Any, ...], CompactionCall]:
    """Those of the boundary and the cache's. Raises as `compress_step`."""
    arguments = check_boundary(hidden, stage, residual, weight, eps, others, keep_indices, layout)
    compaction = _check_cache(cache, stage, layout, native=False)
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
    caches = compaction.caches
    device = caches.tensors[0].device
    if device != hidden.device:
        raise ValueError(
            f"k_caches[0]: expected the device of hidden, {hidden.device}, got {device}"
        )
    if has_place(caches.tensors[0]):
        check_apart(inputs, caches)
    return arguments, compaction


def _check_cache(
    cache: DenseCache | PagedCache, stage: Stage | None, layout: BatchLayout | None, native: bool
) -> CompactionCall:
    if not isinstance(cache, DenseCache | PagedCache):
        raise TypeError(f"cache: expected a DenseCache or a PagedCache, got {type(cache).__name__}")
    own = cache.stage
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
        own = cast(CacheStage, stage)
    if isinstance(cache, DenseCache):
        return check_dense(cache, own, native)
    return check_paged(cache, own, native)


# ---- Schema ----

register(
    "compress_step",
    "(Tensor hidden, Tensor? residual, Tensor? weight, float eps, Tensor[] others, "
    "Tensor? segments, Tensor? keep_indices, Tensor? cu_seqlens, Tensor? spans, int[] keep, "
    "str pattern, SymInt max_height, SymInt num_tokens, Tensor(a!)[] caches, int num_layers, "
    "Tensor? block_table, SymInt block_size, Tensor? cache_segments, Tensor? cache_keep_indices, "
    "Tensor cu_kept, Tensor? cu_rows, Tensor? prefix_lens, Tensor? seq_lens, Tensor? seq_starts, "
    "bool edit_table, Tensor? read_only_blocks, str cache_layout, Tensor(b!)[] outs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=fakes.compress_step,
    triton="compress_step",
)
