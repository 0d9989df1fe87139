"""What the compaction ops check before they call anything: caches, and rows of sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from adsc_kernels.compaction import HostRows, Ints
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.ops._dispatch import Stage, check_table

LAYOUTS = ("NHD", "HND")


class CacheStage(Stage, Protocol):
    """What compaction needs of a StagePlan: a Stage, and whose rows are whose."""

    @property
    def cu_seqlens(self) -> Tensor: ...  # int32 [B + 1] on the device: rows that stay

    @property
    def cu_seqlens_in(self) -> Tensor: ...  # int32 [B + 1] on the device: rows to choose from

    @property
    def seq_lens(self) -> tuple[int, ...]: ...  # the same as lengths, on the host

    @property
    def seq_lens_in(self) -> tuple[int, ...]: ...

    @property
    def cached_lens(self) -> tuple[int, ...]: ...

    def source_rows(self) -> np.ndarray: ...  # host: the row that each row of the stage takes


# ---- Caches ----


class Reach(NamedTuple):
    """A tensor, from its first byte to behind its last."""

    begin: int
    end: int
    tensor: Tensor
    name: str


@dataclass(frozen=True)
class Caches:
    """All tensors that move together, and what they have in common."""

    tensors: list[Tensor]  # K of every layer, V, scales of K, scales of V
    num_layers: int
    num_heads: tuple[int, ...]  # of the first K and the first V
    per_token: bool  # some scales have no heads
    blocks: int  # 1 for caches without that dimension
    tokens: int
    reaches: list[Reach]  # empty while a graph is traced


def axis(rank: int, layout: str, name: str) -> int:
    """The place of "block" (rank 4 only), "token" or "head" in a cache of that rank."""
    order = ("token", "head") if layout == "NHD" else ("head", "token")
    return (("block", *order) if rank == 4 else order).index(name)


def check_caches(
    k_caches: Tensor | Sequence[Tensor],
    v_caches: Tensor | Sequence[Tensor] | None,
    k_scales: Tensor | Sequence[Tensor] | None,
    v_scales: Tensor | Sequence[Tensor] | None,
    layout: str,
) -> Caches:
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    k = _tensors(k_caches, "k_caches", None)
    v = [] if v_caches is None else _tensors(v_caches, "v_caches", len(k))
    if v_caches is None and v_scales is not None:
        raise ValueError("v_scales: expected None without v_caches, got some")
    first = k[0]
    rank = first.dim()
    if rank not in (3, 4):
        raise ValueError(f"k_caches[0]: expected 3 or 4 dimensions, got shape {tuple(first.shape)}")
    places = (axis(rank, layout, "block") if rank == 4 else None, axis(rank, layout, "token"))
    per_token = False
    lists = [(k, "k_caches"), (v, "v_caches")]
    for scales, name in ((k_scales, "k_scales"), (v_scales, "v_scales")):
        if scales is not None:
            lists.append((_tensors(scales, name, len(k)), name))
    for tensors, name in lists:
        is_scale = name.endswith("scales")
        like = tensors[0] if is_scale else first
        of = v if name[0] == "v" else k
        checked: Any = None
        for i, x in enumerate(tensors):
            alike = (x.dtype, x.device, x.shape, x.stride(), x.requires_grad, of[i].shape)
            if alike == checked:
                continue
            if x.dtype != like.dtype:
                whose = f"{name}[0]" if is_scale else "k_caches[0]"
                raise TypeError(f"{name}[{i}]: expected {like.dtype}, as {whose}, got {x.dtype}")
            if x.device != first.device:
                raise ValueError(
                    f"{name}[{i}]: expected the device of k_caches[0], {first.device}, "
                    f"got {x.device}"
                )
            if x.dim() != rank and not (is_scale and rank - 2 <= x.dim() < rank):
                dims = f"{rank - 2} to {rank}" if is_scale else str(rank)
                raise ValueError(
                    f"{name}[{i}]: expected {dims} dimensions, got shape {tuple(x.shape)}"
                )
            headless = x.dim() == rank - 2
            per_token |= headless
            block, token = (0, 1) if headless else (places[0] or 0, places[1])
            if headless and rank == 3:
                token = 0
            sizes = (1 if places[0] is None else x.shape[block], x.shape[token])
            wanted = (1 if places[0] is None else first.shape[places[0]], first.shape[places[1]])
            if sizes != wanted:
                raise ValueError(
                    f"{name}[{i}]: expected {wanted[0]} blocks of {wanted[1]} tokens, as in "
                    f"k_caches[0], in layout {layout}, got shape {tuple(x.shape)}"
                )
            heads = axis(rank, layout, "head")
            if is_scale and not headless and x.shape[heads] != of[i].shape[heads]:
                raise ValueError(
                    f"{name}[{i}]: expected {of[i].shape[heads]} heads, got shape {tuple(x.shape)}"
                )
            if x.dim() == rank and x.shape[-1] > 1 and x.stride(-1) != 1 and x.numel():
                raise ValueError(
                    f"{name}[{i}]: expected unit stride on the last dimension, got strides "
                    f"{tuple(x.stride())}"
                )
            if x.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name}[{i}]: expected a tensor that needs no gradient")
            checked = alike
    tensors = [x for group, _ in lists for x in group]
    names = [f"{name}[{i}]" for group, name in lists for i in range(len(group))]
    reaches: list[Reach] = []
    if not torch.compiler.is_compiling() and first.device.type != "meta":
        reaches = check_overlap(tensors, names)
    return Caches(
        tensors,
        len(k),
        tuple(group[0].shape[axis(rank, layout, "head")] for group in (k, v) if group),
        per_token,
        1 if places[0] is None else first.shape[places[0]],
        first.shape[places[1]],
        reaches,
    )


def _tensors(x: Tensor | Sequence[Tensor], name: str, count: int | None) -> list[Tensor]:
    tensors = [x] if isinstance(x, Tensor) else list(x)
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{i}]: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}[{i}]: expected a strided tensor, got layout {tensor.layout}")
    if not tensors or (count is not None and len(tensors) != count):
        wanted = "at least one tensor" if count is None else f"{count} tensors, as k_caches"
        raise ValueError(f"{name}: expected {wanted}, got {len(tensors)}")
    return tensors


def check_overlap(tensors: Sequence[Tensor], names: Sequence[str]) -> list[Reach]:
    """Where the tensors lie that hold anything.

    Raises ValueError where two tensors, or two elements of one, share memory.
    """
    spans = []
    extents: dict[Any, int] = {}
    for x, name in zip(tensors, names, strict=True):
        form = (x.shape, x.stride())
        extent = extents.get(form, 0)
        if extent == 0:
            if x.numel() == 0:
                continue
            extent = extents[form] = _extent(x, name)
        begin = x.data_ptr()
        spans.append(Reach(begin, begin + extent * x.itemsize, x, name))
    spans.sort(key=lambda span: span[:2])
    # Extents in a chain of overlaps: views into one another's gaps, such as K and V of one storage.
    chain: list[Reach] = []
    end = 0
    for span in [*spans, None]:
        if span is not None and chain and span.begin < end:
            chain.append(span)
            end = max(end, span.end)
            continue
        for a, b in combinations(chain, 2):
            _check_pair(a, b)
        if span is not None:
            chain, end = [span], span.end
    return spans


def _check_pair(a: Reach, b: Reach) -> None:
    """b begins where a does, or later."""
    if a.end > b.begin and _share_memory(a.tensor, b.tensor, b.begin - a.begin):
        raise ValueError(f"{a.name}, {b.name}: expected tensors that don't share memory")


def check_apart(inputs: Sequence[tuple[str, Tensor]], caches: Sequence[Reach]) -> None:
    """Raises ValueError where one of the inputs, by name, shares memory with one of the caches."""
    for name, x in inputs:
        if caches and x.numel():  # none while a graph is traced
            steps = ((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            begin = x.data_ptr()
            reach = Reach(begin, begin + (1 + sum(steps)) * x.itemsize, x, name)
            for cache in caches:
                if reach.begin < cache.end and cache.begin < reach.end:
                    _check_pair(*sorted((reach, cache), key=lambda r: r.begin))


def _extent(x: Tensor, name: str) -> int:
    """Elements from the first to the last of x."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < extent:
                raise ValueError(
                    f"{name}: expected elements that don't share memory, got shape "
                    f"{tuple(x.shape)} with strides {tuple(x.stride())}"
                )
            extent += (size - 1) * stride
    return extent


def _share_memory(a: Tensor, b: Tensor, offset: int) -> bool:
    """Whether two views meet, where b begins `offset` >= 0 bytes behind a.

    Exact where both step through memory alike, as views of one cache do. Otherwise views count as
    apart only if they share their largest stride and keep to different parts of it.
    """
    sizes_a, sizes_b = _steps(a), _steps(b)
    steps = sorted(sizes_a.keys() | sizes_b.keys(), reverse=True)
    outer = steps[0]
    rest_a = sum((n - 1) * step for step, n in sizes_a.items() if step != outer)
    rest_b = sum((n - 1) * step for step, n in sizes_b.items() if step != outer)
    place = offset % outer
    if rest_a < place and place + rest_b < outer:
        return False
    reach = [(sizes_a.get(step, 1) - 1, sizes_b.get(step, 1) - 1) for step in steps]

    def meets(level: int, left: int) -> bool:
        # a's index less b's at this level, times its step: what is left must be made up below.
        if level == len(steps):
            return left == 0
        below = range(level + 1, len(steps))
        high = sum(reach[i][0] * steps[i] for i in below)
        low = -sum(reach[i][1] * steps[i] for i in below)
        least = max(-((high - left) // steps[level]), -reach[level][1])
        most = min((left - low) // steps[level], reach[level][0])
        return any(meets(level + 1, left - i * steps[level]) for i in range(least, most + 1))

    return meets(0, offset)


def _steps(x: Tensor) -> dict[int, int]:
    """How many times each distance in bytes is stepped; a row's bytes are steps of one."""
    width = x.itemsize
    sizes = {
        stride * width: size
        for stride, size in zip(x.stride(), x.shape, strict=True)
        if size > 1 and stride > 0
    }
    inner = sizes.pop(width, 1)
    return {**sizes, 1: inner * width}


# ---- Rows ----


@dataclass(frozen=True)
class Rows:
    """Where rows come from, as the ops take it and as the host knows it."""

    segments: Tensor | None
    keep_indices: Tensor | None  # [layers or 1, heads or 1, rows]
    cu_kept: Tensor
    cu_rows: Tensor | None  # None: all that is cached behind the prefix
    prefix_lens: Tensor | None  # None: 0
    seq_lens: Tensor | None  # None: nothing is cached behind the rows to choose from
    host: HostRows

    @property
    def batch(self) -> int:
        return len(self.host.seq_lens)


IntsLike = Sequence[int] | Ints


def check_rows_of(
    caches: Caches,
    stage: CacheStage | None,
    keep_indices: Tensor | None,
    cu_kept: IntsLike | None,
    cu_rows: IntsLike | None,
    prefix_lens: IntsLike | None,
    seq_lens: IntsLike | None,
    with_sources: bool,
) -> Rows:
    """with_sources: with those of a stage in `host`."""
    if (stage is None) == (keep_indices is None):
        both = "both" if stage is not None else "neither"
        raise ValueError(f"stage, keep_indices: expected exactly one of them, got {both}")
    like = caches.tensors[0]
    if stage is not None:
        for name, value in (("cu_kept", cu_kept), ("cu_rows", cu_rows)):
            if value is not None:
                raise ValueError(f"{name}: expected None with a stage, got {value}")
        if prefix_lens is None and any(stage.cached_lens):
            raise ValueError(
                "prefix_lens: expected the rows cached in front of the stage's, since its plan "
                f"begins behind {stage.cached_lens} rows, got None"
            )
        _check_stage(stage, like)
        batch = len(stage.seq_lens)
    else:
        for name, value in (("cu_kept", cu_kept), ("seq_lens", seq_lens)):
            if value is None:
                raise ValueError(f"{name}: expected it with keep_indices, got None")
        assert cu_kept is not None
        kept = check_ints(cu_kept, "cu_kept", None, like, rising=True)
        batch = len(kept.host) - 1
    prefix = total = rows = None
    if prefix_lens is not None:
        prefix = check_ints(prefix_lens, "prefix_lens", batch, like)
    if seq_lens is not None:
        total = check_ints(seq_lens, "seq_lens", batch, like)
    prefix_host = (0,) * batch if prefix is None else prefix.host
    if stage is not None:
        kept_host, source_host = stage.seq_lens, stage.seq_lens_in
    else:
        kept_host = _differences(kept.host)
        if cu_rows is not None:
            rows = check_ints(cu_rows, "cu_rows", batch + 1, like, rising=True)
            source_host = _differences(rows.host)
        else:
            assert total is not None
            source_host = tuple(n - p for n, p in zip(total.host, prefix_host, strict=True))
    if total is None:
        total_host = tuple(p + n for p, n in zip(prefix_host, source_host, strict=True))
    else:
        total_host = total.host
    for b in range(batch):
        if prefix_host[b] + max(source_host[b], 0) > total_host[b]:
            raise ValueError(
                f"seq_lens: expected at least {prefix_host[b]} + {max(source_host[b], 0)} (prefix "
                f"and rows to choose from) for sequence {b}, got {total_host[b]}"
            )
        if kept_host[b] > source_host[b]:
            raise ValueError(
                f"cu_kept: expected at most {source_host[b]} rows for sequence {b}, "
                f"got {kept_host[b]}"
            )
    row_bounds: Tensor | None
    if stage is not None:
        segments, indices = stage.segments, None
        kept_bounds, row_bounds = stage.cu_seqlens, stage.cu_seqlens_in
        sources = _stage_sources(stage) if with_sources else None
    else:
        assert keep_indices is not None
        segments, indices = None, _check_indices(keep_indices, kept.host[-1], caches)
        kept_bounds, row_bounds = kept.device, None if rows is None else rows.device
        sources = _index_sources(indices, kept.host, source_host)
    return Rows(
        segments,
        indices,
        kept_bounds,
        row_bounds,
        None if prefix is None else prefix.device,
        None if total is None else total.device,
        HostRows(prefix_host, source_host, kept_host, total_host, sources),
    )


def check_ints(
    values: IntsLike, name: str, count: int | None, like: Tensor, rising: bool = False
) -> Ints:
    """values on the host and on the device of `like`, [count] of them (None: at least one)."""
    if isinstance(values, Tensor):
        raise TypeError(f"{name}: expected host ints or Ints(host, device), got a tensor")
    if isinstance(values, np.ndarray):
        values = values.tolist()
    host = values.host if isinstance(values, Ints) else tuple(values)
    if not all(isinstance(n, int) for n in host):
        raise TypeError(f"{name}: expected ints, got {host}")
    if len(host) != count and (count is not None or not host):
        wanted = "at least one" if count is None else str(count)
        raise ValueError(f"{name}: expected {wanted} of them, got {len(host)}")
    if any(n < 0 for n in host):
        raise ValueError(f"{name}: expected at least 0, got {min(host)}")
    if rising and (host[0] != 0 or any(b < a for a, b in pairwise(host))):
        raise ValueError(f"{name}: expected boundaries that rise from 0, got {host}")
    if not isinstance(values, Ints):
        if like.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"{name}: expected Ints(host, device) while a graph is captured, since no graph "
                "keeps what an upload reads, got plain ints"
            )
        return Ints.of(host, like.device)
    check_table(values.device, f"{name}.device", (torch.int32, torch.int64), like, "k_caches[0]")
    if values.device.shape != (len(host),):
        raise ValueError(
            f"{name}.device: expected shape [{len(host)}], got {tuple(values.device.shape)}"
        )
    return values


def _differences(bounds: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(b - a for a, b in pairwise(bounds))


def _check_stage(stage: CacheStage, like: Tensor) -> None:
    batch = len(stage.seq_lens)
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
    if torch.compiler.is_compiling():
        return None
    parts = np.split(stage.source_rows(), np.cumsum(stage.seq_lens, dtype=np.int64)[:-1])
    begins = accumulate((0, *stage.seq_lens_in[:-1]))
    return tuple(part - begin for part, begin in zip(parts, begins, strict=False))


def _check_indices(indices: Tensor, num_kept: int, caches: Caches) -> Tensor:
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
    if rows != num_kept:
        raise ValueError(f"keep_indices: expected {num_kept} rows (cu_kept), got shape {shape}")
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
    if indices.device.type != "cpu" or torch.compiler.is_compiling():
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
