"""The caches of inference engines as the compaction ops take them.

`from_<engine>` takes the tensors that an engine holds and gives K and V of every layer as views of
them, never copies, with the scales of each token, the block table and the layout: a `PagedCache` or
a `DenseCache`. Every axis is checked against what the caller says of the cache, and a shape that
isn't known is refused: nothing is guessed. Engines are not imported.

The views can be made once, when the engine has allocated its cache; for another batch
`dataclasses.replace(cache, block_table=...)` is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from adsc_kernels import checks
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.kv.cache import CacheLayout, DenseCache, PagedCache

if TYPE_CHECKING:
    from transformers import Cache

Layers = Sequence[Tensor] | Mapping[Any, Tensor]
KVLayers = Sequence[Tensor | tuple[Tensor, Tensor]]
_SCALE_BYTES = 4  # of a head's K or V in vLLM's caches with a scale for each


def from_vllm(
    kv_caches: Layers,
    block_table: Tensor,
    *,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_v: int | None = None,
    packing: str | None = None,
) -> PagedCache:
    """vLLM's caches of the layers of one KV-cache group, in any of its three generations.

    kv_caches: each layer's tensor, in a list or by name: `[2, N, block_size, H, D]`,
      `[N, 2, block_size, H, D]`, or since vLLM packs K and V into the content
      `[N, H, block_size, D + Dv]`; as views with whatever strides vLLM's layout has.
    block_table: the group's, int32 `[requests, max_blocks]`: a slice of vLLM's own.
    block_size: of the table's blocks, which is that of the kernel where it differs from the
      allocation's: then several freed blocks make one of the allocator's.
    num_kv_heads, head_dim, head_dim_v: of this rank; V's head size where it differs from K's.
    packing: how a packed tensor holds K and V: "content" (the first D of the last axis are K:
      vLLM's GPU backends) or "halves" (of a block and head's memory the first half is K: vLLM's
      CPU backend). Their shapes don't differ. None takes "content" for a cache on a GPU, and asks
      for a cache on the CPU.

    Scales of each token and head (vLLM's int8_per_token_head and fp8_per_token_head) are a float32
    behind the D bytes of a head's K and V, in a packed content of `2 * (D + 4)`: the views hold
    them as part of each row, D + 4 long, and they move with it. Other scales are of whole tensors.

    Raises UnsupportedError for other shapes (MLA, NVFP4, two blocks in all, which leave open which
    axis is K and V), and ValueError for a packing that isn't one.
    """
    if packing not in (None, "content", "halves"):
        raise ValueError(f"packing: expected 'content', 'halves' or None, got {packing!r}")
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    tensors = list(kv_caches.values() if isinstance(kv_caches, Mapping) else kv_caches)
    row = (block_size, num_kv_heads, head_dim)
    pairs = []
    packed = bool(tensors) and tensors[0].dim() == 4
    if packed and tensors[0].element_size() == 1 and head_dim == head_dim_v:
        with_scale = head_dim + _SCALE_BYTES
        if tensors[0].shape[3] == 2 * with_scale:
            head_dim = head_dim_v = with_scale
    for i, x in enumerate(tensors):
        name, shape = f"kv_caches[{i}]", tuple(x.shape)
        if packed and len(shape) == 4:
            wanted = (num_kv_heads, block_size, head_dim + head_dim_v)
            if shape[1:] != wanted:
                raise _unknown(name, x, f"[N, {', '.join(map(str, wanted))}]")
            pairs.append(_unpack(x, name, head_dim, head_dim_v, packing))
        elif not packed and len(shape) == 5 and shape[2:] == row and head_dim == head_dim_v:
            planes = [axis for axis in (0, 1) if shape[axis] == 2]
            if len(planes) != 1:
                raise _unknown(name, x, "one axis of 2, for K and V, beside that of the blocks")
            k, v = x.unbind(planes[0])
            pairs.append((k, v))
        else:
            first = f"[2, N, {', '.join(map(str, row))}], [N, 2, ...] of the same"
            raise _unknown(name, x, f"{first} or [N, H, block_size, D + Dv], alike in all layers")
    return _paged(pairs, block_table, block_size, "HND" if packed else "NHD")


def _unpack(
    x: Tensor, name: str, head_dim: int, head_dim_v: int, packing: str | None
) -> tuple[Tensor, Tensor]:
    if packing is None and x.device.type == "cpu":
        raise ValueError(
            f"packing: expected 'halves' (vLLM's CPU backend) or 'content' for the packed {name} "
            "on the CPU, whose shape doesn't tell, got None"
        )
    if packing != "halves":
        return x[..., :head_dim], x[..., head_dim:]
    blocks, heads, tokens, _ = x.shape
    if head_dim != head_dim_v or x.stride()[2:] != (2 * head_dim, 1):
        raise _unknown(name, x, "K and V of one size, and each block and head in one piece")
    k, v = x.view(blocks, heads, 2 * tokens, head_dim).chunk(2, dim=2)
    return k, v


def from_flashinfer(
    kv_caches: KVLayers,
    block_table: Tensor,
    *,
    page_size: int,
    kv_layout: CacheLayout = "NHD",
    kv_scales: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> PagedCache:
    """FlashInfer's paged caches, one for each layer.

    kv_caches: each a 5-D tensor, `[pages, 2, page_size, H, D]` in kv_layout "NHD" or
      `[pages, 2, H, page_size, D]` in "HND", or a pair (K, V) of 4-D tensors without the axis of 2.
    block_table: `[B, max_pages]`; of FlashInfer's kv_indices and kv_indptr `csr_to_block_table`
      makes it.
    kv_scales: for each layer the planes (K's, V's) of an NVFP4 cache, in kv_layout as the caches,
      with the groups of a row last, in the order of the tokens (not swizzled). The k_scale and
      v_scale of FlashInfer's run() are of whole tensors: they don't move.

    Raises UnsupportedError for other shapes.
    """
    token_axis = _token_axis(kv_layout)
    pairs = []
    for i, cache in enumerate(kv_caches):
        name = f"kv_caches[{i}]"
        if isinstance(cache, Tensor):
            if cache.dim() != 5 or cache.shape[1] != 2:
                raise _unknown(name, cache, "[pages, 2, ...] in 5 dimensions, or a pair (K, V)")
            k, v = cache.unbind(1)
        else:
            k, v = cache
        for x in (k, v):
            if x.dim() != 4 or x.shape[token_axis] != page_size:
                raise _unknown(name, x, f"{page_size} tokens on axis {token_axis} of 4 of K and V")
        pairs.append((k, v))
    paged = _paged(pairs, block_table, page_size, kv_layout)
    if kv_scales is None:
        return paged
    if len(kv_scales) != len(pairs):
        raise ValueError(f"kv_scales: expected {len(pairs)} layers, got {len(kv_scales)}")
    for i, (scales, caches) in enumerate(zip(kv_scales, pairs, strict=True)):
        for scale, x in zip(scales, caches, strict=True):
            if scale.dim() not in (3, 4) or scale.shape[:3] != x.shape[:3]:
                raise _unknown(f"kv_scales[{i}]", scale, f"{list(x.shape[:3])}, or groups behind")
    return replace(paged, k_scales=[k for k, _ in kv_scales], v_scales=[v for _, v in kv_scales])


def from_tensorrt_llm(
    buffers: Sequence[Tensor],
    block_ids: Tensor,
    *,
    tokens_per_block: int,
    kv_layout: CacheLayout = "HND",
) -> PagedCache:
    """TensorRT-LLM's pools, as its KV-cache manager's `get_buffers(layer, kv_layout)` gives them.

    buffers: for each layer `[pages, 2, H, tokens_per_block, D]` in "HND", in "NHD" with H and
      tokens_per_block exchanged: slices of a pool that interleaves the layers, or pools of
      their own.
    block_ids: `[B, max_blocks]`, as `get_block_ids_per_seq` gives them; of a table of K-plane
      offsets `trtllm_offsets_to_block_table` makes them.

    Its scales of fp8 and int8 caches are of whole tensors: they don't move. Those of NVFP4 lie in a
    pool of their own, which get_buffers doesn't give: not supported.

    Raises UnsupportedError for other shapes (MLA, whose pools have one plane; NVFP4).
    """
    for i, buffer in enumerate(buffers):
        if buffer.dim() != 5 or buffer.shape[1] != 2:
            raise _unknown(f"buffers[{i}]", buffer, "[pages, 2, ...] in 5 dimensions")
        if buffer.dtype == getattr(torch, "float4_e2m1fn_x2", None):
            raise _unknown(f"buffers[{i}]", buffer, "no NVFP4, whose scales lie in another pool")
    return from_flashinfer(buffers, block_ids, page_size=tokens_per_block, kv_layout=kv_layout)


def from_sglang(
    k_buffer: Sequence[Tensor],
    v_buffer: Sequence[Tensor],
    block_table: Tensor,
    *,
    page_size: int = 1,
    k_scale_buffer: Sequence[Tensor] | None = None,
    v_scale_buffer: Sequence[Tensor] | None = None,
) -> PagedCache:
    """SGLang's token pool: `MHATokenToKVPool.k_buffer` and `v_buffer`, lists over layers.

    k_buffer, v_buffer: each `[slots, H, D]`. Page 0 takes the K and V of padding, and is no
      request's.
    block_table: `[B, max_pages]`, of `req_to_token_to_block_table`.
    k_scale_buffer, v_scale_buffer: of `MHATokenToKVPoolFP4`, each `[slots, groups of all heads]`.
      The k_scale and v_scale of SGLang's layers (fp8) are of whole tensors: they don't move.

    Raises UnsupportedError for other shapes, and where the slots aren't whole pages.
    """
    for name, buffers in (("k_buffer", k_buffer), ("v_buffer", v_buffer)):
        for i, x in enumerate(buffers):
            if x.dim() != 3 or x.shape[0] % page_size:
                raise _unknown(f"{name}[{i}]", x, f"[slots, H, D], {page_size} slots to a page")
    k, v = ([x.unflatten(0, (-1, page_size)) for x in buffers] for buffers in (k_buffer, v_buffer))
    return PagedCache(
        k,
        v,
        block_table,
        block_size=page_size,
        k_scales=_slot_scales(k_scale_buffer, "k_scale_buffer", k),
        v_scales=_slot_scales(v_scale_buffer, "v_scale_buffer", v),
    )


def _slot_scales(
    buffers: Sequence[Tensor] | None, name: str, caches: list[Tensor]
) -> list[Tensor] | None:
    """[slots, heads * groups] as [pages, page_size, heads, groups]."""
    if buffers is None:
        return None
    if len(buffers) != len(caches):
        raise ValueError(f"{name}: expected {len(caches)} layers, got {len(buffers)}")
    views = []
    for i, (x, cache) in enumerate(zip(buffers, caches, strict=True)):
        pages, size, heads, _ = cache.shape
        if x.dim() != 2 or x.shape[0] != pages * size or x.shape[1] % heads:
            raise _unknown(f"{name}[{i}]", x, f"[{pages * size}, a multiple of {heads} heads]")
        views.append(x.unflatten(0, (pages, size)).unflatten(2, (heads, -1)))
    return views


def from_transformers(cache: Cache) -> DenseCache:
    """A `DynamicCache` or `StaticCache` of transformers 5, with a prompt in it.

    transformers keeps one length for a whole batch and, for its masks, one for all layers. So
    compact all layers alike, by as many rows in each sequence, and tell the cache afterwards with
    `crop_transformers`.

    Raises TypeError for what isn't a Cache, ValueError for a layer without a prompt, and
    UnsupportedError for other layers: sliding windows (whose rows aren't in the order of tokens),
    quantized, linear-attention and offloaded ones.
    """
    layers = _dense_layers(cache)
    for i, layer in enumerate(layers):
        if not layer.is_initialized or layer.keys.dim() != 4:
            raise ValueError(f"cache.layers[{i}]: expected a layer with a prompt, got an empty one")
    k, v = [layer.keys for layer in layers], [layer.values for layer in layers]
    return DenseCache(k, v, layout="HND")


def crop_transformers(cache: Cache, seq_lens: Sequence[int]) -> None:
    """Tell a compacted cache its new length, `CompactionResult.seq_lens.host`.

    A DynamicCache is cut to views, whose storage goes with the next token, when transformers
    allocates anew; a StaticCache only counts from there on. It doesn't wait for the device.

    Raises ValueError where the sequences' lengths differ, or exceed the cache.
    """
    from transformers.cache_utils import DynamicLayer

    layers = _dense_layers(cache)
    lens = [checks.integer("seq_lens", n, 0) for n in seq_lens]
    if not lens:
        raise ValueError("seq_lens: expected one length for each sequence, got none")
    length, *others = lens
    if any(n != length for n in others):
        raise ValueError(f"seq_lens: expected one length for the batch, got {tuple(seq_lens)}")
    for i, layer in enumerate(layers):
        if length > layer.keys.shape[-2]:
            raise ValueError(
                f"seq_lens: expected at most the {layer.keys.shape[-2]} rows of layer {i}, "
                f"got {length}"
            )
    for layer in layers:
        if isinstance(layer, DynamicLayer):
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        elif hasattr(layer, "cumulative_length"):
            layer.cumulative_length.fill_(length)
        else:  # transformers 5.0 counts the rows that aren't zero
            layer.keys[:, :, length:].zero_()


def _dense_layers(cache: Cache) -> list[Any]:
    from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

    if not isinstance(cache, Cache):
        raise TypeError(f"cache: expected a transformers Cache, got {type(cache).__name__}")
    layers = cast(list[Any], cache.layers)
    for i, layer in enumerate(layers):
        # Not isinstance: the layers that inherit from these two order their rows in other ways.
        if type(layer) not in (DynamicLayer, StaticLayer) or getattr(cache, "offloading", False):
            raise UnsupportedError(
                f"cache.layers[{i}]: expected a DynamicLayer or StaticLayer that isn't offloaded, "
                f"got {type(layer).__name__}"
            )
    return layers


def _paged(
    pairs: Sequence[tuple[Tensor, Tensor]], table: Tensor, block_size: int, layout: CacheLayout
) -> PagedCache:
    k, v = [k for k, _ in pairs], [v for _, v in pairs]
    return PagedCache(k, v, table, block_size=block_size, layout=layout)


def _token_axis(kv_layout: CacheLayout) -> int:
    if kv_layout not in ("NHD", "HND"):
        raise ValueError(f"kv_layout: expected 'NHD' or 'HND', got {kv_layout!r}")
    return 1 if kv_layout == "NHD" else 2


def _unknown(name: str, x: Tensor, expected: str) -> UnsupportedError:
    got = f"shape {tuple(x.shape)}, strides {tuple(x.stride())}"
    return UnsupportedError(f"{name}: expected {expected}, got {got}")
