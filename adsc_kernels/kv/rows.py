"""What the compaction ops check of rows: which stay, and whose they are."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adsc_kernels import checks
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.kv.cache import CacheStage, DenseCache, IntsLike, PagedCache
from adsc_kernels.kv.pages import HostRows, Ints
from adsc_kernels.kv.tensors import Caches
from adsc_kernels.plan import StagePlan
from adsc_kernels.rows import check_table, is_readable


class Rows(NamedTuple):
    """Where rows come from, as the ops' schemas take it."""

    segments: Tensor | None
    keep_indices: Tensor | None  # [layers or 1, heads or 1, rows]
    cu_kept: Tensor
    cu_rows: Tensor | None  # None: all that is cached behind the prefix
    prefix_lens: Tensor | None  # None: 0
    seq_lens: Tensor | None  # None: nothing is cached behind the rows to choose from


def check_rows(
    cache: DenseCache | PagedCache,
    stage: CacheStage | None,
    caches: Caches,
    with_sources: bool,
    native: bool,
) -> tuple[Rows, HostRows]:
    """stage: the cache's. with_sources: those of a stage too. native: a native op is to check the
    stage's tables."""
    like = caches.tensors[0]
    seen = native or not torch.compiler.is_compiling()
    if seen and type(stage) is StagePlan and _says_all(stage, cache):
        if not native:
            _check_stage(stage, like)
        return _rows_of_plan(stage, with_sources)
    if stage is not None and not native:
        _check_fields(stage)
    _check_words(cache, stage)
    kept: Ints | None = None
    if stage is not None:
        if not native or not _is_usual(stage):
            _check_stage(stage, like)
        batch = stage.cu_seqlens.shape[0] - 1
    else:
        assert cache.cu_kept is not None
        kept = check_ints(cache.cu_kept, "cu_kept", None, like, rising=True)
        batch = kept.device.shape[0] - 1
    prefix = _some_ints(cache.prefix_lens, "prefix_lens", batch, like)
    total = _some_ints(cache.seq_lens, "seq_lens", batch, like)
    rows = _some_ints(cache.cu_rows, "cu_rows", batch + 1, like, rising=True)
    device = [None if ints is None else ints.device for ints in (rows, prefix, total)]
    mapping = _mapping(cache, stage, caches, kept, device)
    if torch.compiler.is_compiling():
        return mapping, HostRows(batch, (), (), (), (), None)
    prefix_host = (0,) * batch if prefix is None else prefix.host
    if stage is not None:
        kept_host, source_host = stage.seq_lens, stage.seq_lens_in
    else:
        assert kept is not None
        kept_host = _differences(kept.host)
        if rows is not None:
            source_host = _differences(rows.host)
        else:
            assert total is not None
            source_host = tuple(n - p for n, p in zip(total.host, prefix_host, strict=True))
    if total is not None:
        total_host = total.host
    else:
        total_host = tuple(p + n for p, n in zip(prefix_host, source_host, strict=True))
    _check_lens(prefix_host, source_host, kept_host, total_host)
    if stage is not None:
        sources = _stage_sources(stage) if with_sources else None
    else:
        assert kept is not None and mapping.keep_indices is not None
        sources = _index_sources(mapping.keep_indices, kept.host, source_host)
    return mapping, HostRows(batch, prefix_host, source_host, kept_host, total_host, sources)


def _says_all(stage: StagePlan, cache: DenseCache | PagedCache) -> bool:
    """Whether a plan's stage is all that says which rows stay, and nothing is wrong with it but
    what a native op finds."""
    return (
        cache.keep_indices is None
        and cache.cu_kept is None
        and cache.cu_rows is None
        and cache.prefix_lens is None
        and cache.seq_lens is None
        and stage.only_drops
        and _is_usual(stage)
    )


def _rows_of_plan(stage: StagePlan, with_sources: bool) -> tuple[Rows, HostRows]:
    lens, batch = stage.seq_lens_in, len(stage.seq_lens)
    sources = _stage_sources(stage) if with_sources else None
    return (
        Rows(stage.segments, None, stage.cu_seqlens, stage.cu_seqlens_in, None, None),
        HostRows(batch, (0,) * batch, lens, stage.seq_lens, lens, sources),
    )


def _mapping(
    cache: DenseCache | PagedCache,
    stage: CacheStage | None,
    caches: Caches,
    kept: Ints | None,
    device: list[Tensor | None],
) -> Rows:
    """device: cu_rows, prefix_lens and seq_lens."""
    if stage is not None:
        of_stage = (stage.segments, None, stage.cu_seqlens, stage.cu_seqlens_in)
        return Rows(*of_stage, *device[1:])
    assert kept is not None and cache.keep_indices is not None
    return Rows(None, _check_indices(cache.keep_indices, kept, caches), kept.device, *device)


def _check_fields(stage: CacheStage) -> None:
    checks.stage("stage", stage)
    if not torch.compiler.is_compiling():  # a graph that looks at lengths serves them alone
        lengths = ("cu_seqlens", "cu_seqlens_in", "seq_lens", "seq_lens_in", "cached_lens")
        checks.has("stage", stage, "a StagePlan, which says whose rows are whose", lengths)


def _check_words(cache: DenseCache | PagedCache, stage: CacheStage | None) -> None:
    """Which of them go together."""
    if (stage is None) == (cache.keep_indices is None):
        both = "both" if stage is not None else "neither"
        raise ValueError(f"stage, keep_indices: expected exactly one of them, got {both}")
    if stage is None:
        for name, value in (("cu_kept", cache.cu_kept), ("seq_lens", cache.seq_lens)):
            if value is None:
                raise ValueError(f"{name}: expected it with keep_indices, got None")
        return
    for name, value in (("cu_kept", cache.cu_kept), ("cu_rows", cache.cu_rows)):
        if value is not None:
            raise ValueError(f"{name}: expected None with a stage, got {value}")
    if torch.compiler.is_compiling():
        return
    if cache.prefix_lens is None and any(stage.cached_lens):
        raise ValueError(
            "prefix_lens: expected the rows cached in front of the stage's, since its plan "
            f"begins behind {stage.cached_lens} rows, got None"
        )


def _check_lens(
    prefix: tuple[int, ...],
    source: tuple[int, ...],
    kept: tuple[int, ...],
    total: tuple[int, ...],
) -> None:
    for b in range(len(total)):
        if prefix[b] + max(source[b], 0) > total[b]:
            raise ValueError(
                f"seq_lens: expected at least {prefix[b]} + {max(source[b], 0)} (prefix and rows "
                f"to choose from) for sequence {b}, got {total[b]}"
            )
        if kept[b] > source[b]:
            raise ValueError(
                f"cu_kept: expected at most {source[b]} rows for sequence {b}, got {kept[b]}"
            )


def _some_ints(
    values: IntsLike | None, name: str, count: int, like: Tensor, rising: bool = False
) -> Ints | None:
    return None if values is None else check_ints(values, name, count, like, rising)


def check_ints(
    values: IntsLike, name: str, count: int | None, like: Tensor, rising: bool = False
) -> Ints:
    """values on the host and on the device of `like`, [count] of them (None: at least one)."""
    if isinstance(values, Tensor):
        raise TypeError(f"{name}: expected host ints or Ints(host, device), got a tensor")
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, Ints) and torch.compiler.is_compiling():
        return _check_device_ints(values, name, count, like)
    host = _host_ints(values.host if isinstance(values, Ints) else values, name)
    if not all(type(n) is int for n in host):
        for n in host:
            checks.integer(name, n)
    if len(host) != count and (count is not None or not host):
        wanted = "at least one" if count is None else str(count)
        raise ValueError(f"{name}: expected {wanted} of them, got {len(host)}")
    if any(n < 0 for n in host):
        raise ValueError(f"{name}: expected at least 0, got {min(host)}")
    if not torch.compiler.is_compiling() and max(host, default=0) > checks.INT32_MAX:
        raise ValueError(f"{name}: expected at most 2^31 - 1, got {max(host)}")
    if rising and (host[0] != 0 or any(b < a for a, b in pairwise(host))):
        raise ValueError(f"{name}: expected boundaries that rise from 0, got {host}")
    if not isinstance(values, Ints):
        if like.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"{name}: expected Ints(host, device) while a graph is captured, since no graph "
                "keeps what an upload reads, got plain ints"
            )
        return Ints.of(host, like.device)
    _check_device_ints(values, name, len(host), like)
    _check_same_ints(values, name)
    return values


def _check_device_ints(values: Ints, name: str, count: int | None, like: Tensor) -> Ints:
    device = values.device
    check_table(device, f"{name}.device", (torch.int32, torch.int64), like, "k_caches[0]")
    if device.dim() != 1 or (count is not None and device.shape[0] != count):
        wanted = "any number" if count is None else str(count)
        raise ValueError(f"{name}.device: expected shape [{wanted}], got {tuple(device.shape)}")
    return values


def _host_ints(values: Any, name: str) -> tuple[Any, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected host ints or Ints(host, device), got {values!r}")
    return tuple(values)


def _check_same_ints(values: Ints, name: str) -> None:
    """Both sides of Ints must be the same, where the host can read them without a wait."""
    device = values.device
    if is_readable(device) and tuple(device.tolist()) != tuple(values.host):
        raise ValueError(
            f"{name}: expected Ints whose host and device are the same, got "
            f"{checks.shown(values.host)} and {checks.shown(device.tolist())}"
        )


def _differences(bounds: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(b - a for a, b in pairwise(bounds))


def _is_usual(stage: CacheStage) -> bool:
    """Whether a native op finds whatever is wrong with the tables of a stage: it takes boundaries
    of int64 too, and knows no lengths on the host."""
    bounds, batch = stage.cu_seqlens, len(stage.seq_lens)
    return (
        bounds.dtype == stage.cu_seqlens_in.dtype == torch.int32
        and bounds.shape == (batch + 1,)
        and (stage.segments.shape[0] > 0 or stage.num_tokens == 0)
    )


def _check_stage(stage: CacheStage, like: Tensor) -> None:
    traced = torch.compiler.is_compiling()
    batch = stage.cu_seqlens.shape[0] - 1 if traced else len(stage.seq_lens)
    for table, name, shape in (
        (stage.segments, "stage.segments", (-1, 6)),
        (stage.cu_seqlens, "stage.cu_seqlens", (batch + 1,)),
        (stage.cu_seqlens_in, "stage.cu_seqlens_in", (batch + 1,)),
    ):
        check_table(table, name, (torch.int32,), like, "k_caches[0]")
        if table.dim() != len(shape) or table.shape[-1] != shape[-1]:
            wanted = "[S, 6]" if len(shape) == 2 else str(list(shape))
            raise ValueError(f"{name}: expected shape {wanted}, got {tuple(table.shape)}")
    if stage.num_tokens > 0 and stage.segments.shape[0] == 0:
        raise ValueError(
            f"stage.segments: expected a table for {stage.num_tokens} rows, got an empty one"
        )


def _stage_sources(stage: CacheStage) -> tuple[np.ndarray, ...] | None:
    parts = np.split(stage.source_rows(), np.cumsum(stage.seq_lens, dtype=np.int64)[:-1])
    begins = accumulate((0, *stage.seq_lens_in[:-1]))
    return tuple(part - begin for part, begin in zip(parts, begins, strict=False))


def _check_indices(indices: Tensor, kept: Ints, caches: Caches) -> Tensor:
    """indices as [layers or 1, heads or 1, rows]."""
    check_table(
        indices, "keep_indices", (torch.int32, torch.int64), caches.tensors[0], "k_caches[0]"
    )
    shape = tuple(indices.shape)
    if len(shape) not in (1, 2, 3):
        raise ValueError(
            "keep_indices: expected shape [rows], [heads, rows] or [layers or 1, heads or 1, "
            f"rows], got {shape}"
        )
    layers, heads, rows = (1,) * (3 - len(shape)) + shape
    if not torch.compiler.is_compiling() and rows != kept.host[-1]:
        raise ValueError(
            f"keep_indices: expected {kept.host[-1]} rows (cu_kept), got shape {shape}"
        )
    if layers not in (1, caches.num_layers):
        raise ValueError(f"keep_indices: expected 1 or {caches.num_layers} layers, got {shape}")
    if heads != 1:
        for name, count in zip("kv", caches.num_heads, strict=False):
            if heads != count:
                raise ValueError(
                    f"keep_indices: expected 1 or {count} heads, as in {name}_caches[0], "
                    f"got shape {shape}"
                )
        if caches.per_token:
            raise UnsupportedError(
                "keep_indices: one selection for each head can't move scales that all heads share"
            )
    return indices.view(layers, heads, rows)


def _index_sources(
    indices: Tensor, cu_kept: tuple[int, ...], source_lens: tuple[int, ...]
) -> tuple[np.ndarray, ...] | None:
    """keep_indices by sequence, checked, where the host can read them."""
    if not is_readable(indices):
        return None
    values = indices.numpy().astype(np.int64, copy=False)
    sources = []
    for b, (begin, end) in enumerate(pairwise(cu_kept)):
        own = values[..., begin:end]
        if own.size and (own.min() < 0 or own.max() >= source_lens[b]):
            bad = own[(own < 0) | (own >= source_lens[b])][0]
            raise ValueError(
                f"keep_indices: expected values in [0, {source_lens[b]}) for sequence {b}, "
                f"got {bad}"
            )
        if (np.diff(own) <= 0).any():
            raise ValueError(f"keep_indices: expected rising values in sequence {b}, got others")
        sources.append(own[0, 0])
    return tuple(sources) if values.shape[:2] == (1, 1) else None
