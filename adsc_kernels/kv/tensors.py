"""What the compaction ops check of a cache's tensors."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from adsc_kernels import checks
from adsc_kernels.backend import native_problem
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.kv.cache import CacheLayout, DenseCache, PagedCache, Tensors
from adsc_kernels.kv.kept import KeptCaches
from adsc_kernels.kv.overlap import check_overlap, places_apart
from adsc_kernels.rows import is_plain

LAYOUTS = ("NHD", "HND")


class Places:
    """Where tensors lie that are alike within their kinds but for that."""

    __slots__ = ("addresses", "prepared")

    def __init__(self, addresses: list[int]) -> None:
        self.addresses = addresses
        self.prepared: dict[Any, Any] = {}  # what a launcher works out of them, for the next call


class Caches(NamedTuple):
    """All tensors that move together, and what they have in common."""

    tensors: list[Tensor]  # K of every layer, V, scales of K, scales of V
    num_layers: int
    num_heads: tuple[int, ...]  # of the first K and the first V
    per_token: bool  # some scales have no heads
    blocks: int  # 1 for caches without that dimension
    tokens: int
    kinds: tuple[str, ...]  # of each num_layers tensors: "k_caches" and so on
    number: int | None = None  # by which the native library keeps them
    places: Places | None = None  # where those of a kind are known to be alike but for them

    @property
    def names(self) -> list[str]:
        return [f"{kind}[{i}]" for kind in self.kinds for i in range(self.num_layers)]


def check_no_transform(name: str) -> None:
    """Raises UnsupportedError under a transform of torch.func, which sees no write in place."""
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedError(
            f"{name}: expected plain tensors, since torch.func's transforms don't see what is "
            "written in place, got a call under one"
        )


def check_writable(x: Tensor, name: str) -> None:
    """Raises ValueError where torch lets nothing be written in place."""
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name}: expected a tensor that may be written here, got an inference tensor outside "
            "of torch.inference_mode()"
        )


def axis(rank: int, layout: CacheLayout, name: str) -> int:
    """The place of "token" or "head" in a cache of that rank."""
    order = ("token", "head") if layout == "NHD" else ("head", "token")
    return rank - 3 + order.index(name)


def check_caches(cache: DenseCache | PagedCache) -> Caches:
    """Types, devices, shapes and strides of all tensors, and that no two share memory."""
    check_no_transform("k_caches")
    checks.choice("layout", cache.layout, LAYOUTS)
    k = _tensors(cache.k_caches, "k_caches", None)
    v = [] if cache.v_caches is None else _tensors(cache.v_caches, "v_caches", len(k))
    if cache.v_caches is None and cache.v_scales is not None:
        raise ValueError("v_scales: expected None without v_caches, got some")
    first = k[0]
    rank = first.dim()
    if rank not in (3, 4):
        raise ValueError(f"k_caches[0]: expected 3 or 4 dimensions, got shape {tuple(first.shape)}")
    traced = torch.compiler.is_compiling()
    lists = {"k_caches": k, "v_caches": v}
    for name, scales in (("k_scales", cache.k_scales), ("v_scales", cache.v_scales)):
        if scales is not None:
            lists[name] = _tensors(scales, name, len(k))
    alike = not traced and all(map(_are_alike, lists.values()))
    for name, tensors in lists.items():
        checked: Any = None
        for i, x in enumerate(tensors[:1] if alike else tensors):
            of = (k if name[0] == "k" else v)[i]
            marks = (x.requires_grad, traced or x.is_inference())
            form = (x.dtype, x.device, x.shape, x.stride(), marks, of.shape)
            if form != checked:
                scaled = of if name.endswith("scales") else None
                _check_type(x, name, i, first if scaled is None else tensors[0], first)
                if not traced:  # Dynamo doesn't know inference tensors
                    check_writable(x, f"{name}[{i}]")
                _check_form(x, f"{name}[{i}]", scaled, first, cache.layout)
                checked = form
    tensors = [x for group in lists.values() for x in group]
    caches = Caches(
        tensors,
        len(k),
        tuple(group[0].shape[axis(rank, cache.layout, "head")] for group in (k, v) if group),
        any(x.dim() == rank - 2 for x in tensors[2 * len(k) if v else len(k) :]),
        *_blocks_and_tokens(first, rank, cache.layout),
        tuple(name for name, group in lists.items() if group),
    )
    if not has_place(first):
        return caches
    addresses = places_apart(lists.values()) if alike else None
    if addresses is None:
        check_overlap(tensors, caches.names)
    return caches if addresses is None else caches._replace(places=Places(addresses))


def has_place(x: Tensor) -> bool:
    """Whether x has an address: not traced, not meta, not fake."""
    traced = torch.compiler.is_compiling()
    return not (traced or x.device.type == "meta" or isinstance(x, FakeTensor))


def known_caches(cache: DenseCache | PagedCache, native: bool) -> Caches:
    """`check_caches`, which from an object's second call on the library remembers: it keeps the
    tensors, and finds in each call whether they are what they were.

    native: in front of a native op, which asks that itself and needs no list of them.
    """
    check = _usual_caches if native else check_caches
    memory = cache._kept
    if memory is None or not (native or _can_be_kept(cache.first())):
        return check(cache)
    for kept in memory[:]:  # one, or none before the first call; other threads may change it
        if kept is None or not kept.holds(cache):
            kept = KeptCaches(cache, check(cache))
            memory[:] = (kept,)
        elif (torch.is_grad_enabled() and torch._C._any_requires_grad(kept.caches.tensors)) or (
            kept.any_inference and not torch.is_inference_mode_enabled()
        ):
            return check_caches(cache)
        elif not native and not kept.unchanged():
            break
        return kept.caches if native else kept.listed
    memory[:] = (None,)
    return check(cache)


def _can_be_kept(first: Any) -> bool:
    """Whether the library may look at tensors like this one, where it doesn't serve them."""
    return (
        not torch.compiler.is_compiling()
        and type(first) is Tensor
        and first.device.type != "meta"
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not native_problem()
    )


def _usual_caches(cache: DenseCache | PagedCache) -> Caches:
    """`check_caches` but for what the native library checks itself: places, shapes and strides,
    that the caches of a kind are alike and that no two share memory. So of the usual caches, K and
    V without scales, only what it isn't told is looked at here. Whatever else comes goes the whole
    way."""
    k, v = cache.k_caches, cache.v_caches
    k = [k] if isinstance(k, Tensor) else k
    v = [v] if isinstance(v, Tensor) else [] if v is None else v
    first, layout = k[0], cache.layout
    rank = first.dim()
    if (
        (rank != 3 and rank != 4)
        or (
            cache.v_caches is not None
            and (len(v) != len(k) or v[0].dtype != first.dtype or v[0].dim() != rank)
        )
        or cache.k_scales is not None
        or cache.v_scales is not None
        or (layout != "NHD" and layout != "HND")
    ):
        return check_caches(cache)
    tensors = [*k, *v]
    if (torch.is_grad_enabled() and torch._C._any_requires_grad(tensors)) or (
        not torch.is_inference_mode_enabled() and any(map(Tensor.is_inference, tensors))
    ):
        return check_caches(cache)
    head = rank - 2 if layout == "NHD" else rank - 3
    shape = first.shape
    return Caches(
        tensors,
        len(k),
        (shape[head], v[0].shape[head]) if v else (shape[head],),
        False,
        shape[0] if rank == 4 else 1,
        shape[2 * rank - 5 - head],
        ("k_caches", "v_caches") if v else ("k_caches",),
    )


def _are_alike(tensors: list[Tensor]) -> bool:
    """Whether what is found of the first goes for all, but for where they lie, or there is none;
    False where some need a gradient or are inference tensors that can't be written, which is for
    `check_caches` to say. Asked of all at once, a property takes a fraction of the time that it
    takes in a loop."""
    if not tensors:
        return True
    devices = [*map(_DEVICE, tensors)]
    return (
        devices.count(devices[0]) == len(devices)
        and all(len({*map(get, tensors)}) == 1 for get in _FORM)
        and not torch._C._any_requires_grad(tensors)
        and (torch.is_inference_mode_enabled() or True not in map(Tensor.is_inference, tensors))
    )


_DEVICE = operator.attrgetter("device")
_FORM: tuple[Callable[[Tensor], Any], ...] = (
    *map(operator.attrgetter, ("shape", "dtype")),
    Tensor.stride,
)


def _check_type(x: Tensor, name: str, i: int, like: Tensor, first: Tensor) -> None:
    """like: the first of the same kind, of which it takes the dtype; first: the first K."""
    if x.dtype != like.dtype:
        whose = "k_caches" if like is first else name
        raise TypeError(f"{name}[{i}]: expected {like.dtype}, as {whose}[0], got {x.dtype}")
    if x.device != first.device:
        raise ValueError(
            f"{name}[{i}]: expected the device of k_caches[0], {first.device}, got {x.device}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}[{i}]: expected a tensor that needs no gradient")


def _check_form(
    x: Tensor, name: str, scaled: Tensor | None, first: Tensor, layout: CacheLayout
) -> None:
    """scaled: what x are scales of; None where x is a cache itself."""
    rank, shape = first.dim(), tuple(x.shape)
    if x.dim() != rank and (scaled is None or not rank - 2 <= x.dim() < rank):
        dims = str(rank) if scaled is None else f"{rank - 2} to {rank}"
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {shape}")
    blocks, tokens = _blocks_and_tokens(first, rank, layout)
    if _blocks_and_tokens(x, rank, layout) != (blocks, tokens):
        raise ValueError(
            f"{name}: expected {blocks} blocks of {tokens} tokens, as in k_caches[0], in layout "
            f"{layout}, got shape {shape}"
        )
    head = axis(rank, layout, "head")
    if scaled is not None and x.dim() > rank - 2 and x.shape[head] != scaled.shape[head]:
        raise ValueError(f"{name}: expected {scaled.shape[head]} heads, got shape {shape}")
    if x.dim() == rank and x.shape[-1] > 1 and x.stride(-1) != 1 and x.numel():
        raise ValueError(
            f"{name}: expected unit stride on the last dimension, got strides {tuple(x.stride())}"
        )


def _blocks_and_tokens(x: Tensor, rank: int, layout: CacheLayout) -> tuple[int, int]:
    """Of a cache of that rank, or of scales of one, which may lack its heads and last dimension."""
    token = rank - 3 if x.dim() == rank - 2 else axis(rank, layout, "token")
    return x.shape[0] if rank == 4 else 1, x.shape[token]


def _tensors(x: Tensors, name: str, count: int | None) -> list[Tensor]:
    if not isinstance(x, Tensor | Sequence) or isinstance(x, str):
        raise TypeError(f"{name}: expected a tensor or a list of them, got {checks.kind(x)}")
    tensors = [x] if isinstance(x, Tensor) else list(x)
    for i, tensor in enumerate(tensors):
        if not is_plain(tensor):  # the name is put together only if it is needed
            checks.tensor(f"{name}[{i}]", tensor)
    if not tensors or (count is not None and len(tensors) != count):
        wanted = "at least one tensor" if count is None else f"{count} tensors, as k_caches"
        raise ValueError(f"{name}: expected {wanted}, got {len(tensors)}")
    return tensors
