"""The caches of inference engines as the compaction ops take them.

`from_<engine>` takes the tensors that an engine holds and gives K and V of every layer as views of
them, never copies, with the block table and the layout: the arguments of `ops.compact_paged_kv_` or
`ops.compact_kv_`. Every axis is checked against what the caller says of the cache, and a shape that
isn't known is refused: nothing is guessed. Engines are not imported.

The views can be made once, when the engine has allocated its cache; for another batch
`dataclasses.replace(cache, block_table=...)` is enough. Where an engine keeps its table in another
form, the functions at the end convert it; they copy, and belong where the engine builds its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from adsc_kernels.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import Cache

Layers = Sequence[Tensor] | Mapping[Any, Tensor]
KVLayers = Sequence[Tensor | tuple[Tensor, Tensor]]
_SCALE_BYTES = 4  # of a head's K or V in vLLM's caches with a scale for each
SLOT_OF_PADDING = 0  # SGLang writes the K and V of padding there


@dataclass(frozen=True, eq=False)
class PagedCache:
    """What `compact_paged_kv_` takes.

    k_caches, v_caches: for each layer a view, [blocks, block_size, H, D] in layout "NHD" or
      [blocks, H, block_size, D] in "HND", with the engine's own strides.
    block_table: [B, max_blocks], int32 or int64 as the engine has it.
    k_scales, v_scales: where the engine keeps scales of each token in tensors of their own: for
      each layer [blocks, block_size, H] or [blocks, H, block_size], as the layout says, or with
      groups behind. A scale of a whole tensor moves nowhere, and isn't given.
    """

    k_caches: list[Tensor]
    v_caches: list[Tensor]
    block_table: Tensor
    block_size: int
    layout: str
    k_scales: list[Tensor] | None = None
    v_scales: list[Tensor] | None = None


@dataclass(frozen=True, eq=False)
class DenseCache:
    """What `compact_kv_` takes: for each layer a view, [B, H, capacity, D] in layout "HND"."""

    k_caches: list[Tensor]
    v_caches: list[Tensor]
    layout: str


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

    Args:
        kv_caches: each layer's tensor, in a list or by name: `[2, N, block_size, H, D]`,
            `[N, 2, block_size, H, D]`, or since vLLM packs K and V into the content
            `[N, H, block_size, D + Dv]`; as views with whatever strides vLLM's layout has.
        block_table: the group's, int32 `[requests, max_blocks]`: a slice of vLLM's own.
        block_size: of the table's blocks, which is that of the kernel where it differs from the
            allocation's: then several freed blocks make one of the allocator's.
        num_kv_heads, head_dim, head_dim_v: of this rank; V's head size where it differs from K's.
        packing: how a packed tensor holds K and V: "content" (the first D of the last axis are K:
            vLLM's GPU backends) or "halves" (of a block and head's memory the first half is K:
            vLLM's CPU backend). Their shapes don't differ. None takes "content" for a cache on
            a GPU, and asks for a cache on the CPU.

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
    kv_layout: str = "NHD",
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
    buffers: Sequence[Tensor], block_ids: Tensor, *, tokens_per_block: int, kv_layout: str = "HND"
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
        page_size,
        "NHD",
        _slot_scales(k_scale_buffer, "k_scale_buffer", k),
        _slot_scales(v_scale_buffer, "v_scale_buffer", v),
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
    return DenseCache([layer.keys for layer in layers], [layer.values for layer in layers], "HND")


def crop_transformers(cache: Cache, seq_lens: Sequence[int]) -> None:
    """Tell a compacted cache its new length, `CompactionResult.seq_lens.host`.

    A DynamicCache is cut to views, whose storage goes with the next token, when transformers
    allocates anew; a StaticCache only counts from there on. It doesn't wait for the device.

    Raises ValueError where the sequences' lengths differ, or exceed the cache.
    """
    from transformers.cache_utils import DynamicLayer

    layers = _dense_layers(cache)
    length, *others = seq_lens
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
    pairs: Sequence[tuple[Tensor, Tensor]], table: Tensor, block_size: int, layout: str
) -> PagedCache:
    return PagedCache([k for k, _ in pairs], [v for _, v in pairs], table, block_size, layout)


def _token_axis(kv_layout: str) -> int:
    if kv_layout not in ("NHD", "HND"):
        raise ValueError(f"kv_layout: expected 'NHD' or 'HND', got {kv_layout!r}")
    return 1 if kv_layout == "NHD" else 2


def _unknown(name: str, x: Tensor, expected: str) -> UnsupportedError:
    got = f"shape {tuple(x.shape)}, strides {tuple(x.stride())}"
    return UnsupportedError(f"{name}: expected {expected}, got {got}")


# ---- Tables: these copy, so call them where the batch is built ----


def csr_to_block_table(indices: Tensor, indptr: Sequence[int]) -> Tensor:
    """FlashInfer's kv_indices [blocks of all] and kv_indptr, B + 1 host ints, to [B, max_blocks].

    -1 stands behind each sequence's blocks. It doesn't wait for the device.
    """
    counts = _host(indptr, "indptr")
    if not counts or counts[0] != 0 or counts[-1] != indices.shape[0] or counts != sorted(counts):
        raise ValueError(
            f"indptr: expected ints from 0 to the {indices.shape[0]} indices that never decrease, "
            f"got {counts}"
        )
    if len(counts) == 1:
        return indices.new_empty((0, 0))
    rows = indices.split([end - begin for begin, end in pairwise(counts)])
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-1)


def block_table_to_csr(block_table: Tensor, num_blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[B, max_blocks] and each sequence's count, host ints, to FlashInfer's (indices, indptr).

    indices keep the table's dtype (FlashInfer asks for int32), indptr is int32 [B + 1].
    """
    counts = _host(num_blocks, "num_blocks")
    if len(counts) != block_table.shape[0] or not all(
        0 <= n <= block_table.shape[1] for n in counts
    ):
        raise ValueError(
            f"num_blocks: expected {block_table.shape[0]} ints up to {block_table.shape[1]}, "
            f"got {counts}"
        )
    rows = [block_table[b, :n] for b, n in enumerate(counts)]
    indptr = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    indices = torch.cat(rows) if rows else block_table.new_empty(0)
    return indices, indptr.to(block_table.device, non_blocking=True)


def req_to_token_to_block_table(
    req_to_token: Tensor,
    req_pool_indices: Tensor | Sequence[int],
    *,
    page_size: int = 1,
    max_len: int | None = None,
) -> Tensor:
    """SGLang's req_to_token [requests, context], int32 slots, to the table of some requests' pages.

    req_pool_indices: the requests' rows. max_len: of the longest, if less than the context.
    """
    rows = req_to_token[:, :max_len].index_select(0, _on(req_pool_indices, req_to_token))
    return rows if page_size == 1 else rows[:, ::page_size] // page_size


def req_to_token_to_csr(
    req_to_token: Tensor, req_pool_indices: Tensor | Sequence[int], seq_lens: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """SGLang's req_to_token to FlashInfer's (indices, indptr) at page size 1.

    seq_lens: rows of each request, host ints.
    """
    lens = _host(seq_lens, "seq_lens")
    table = req_to_token_to_block_table(
        req_to_token, req_pool_indices, max_len=max(lens, default=0)
    )
    return block_table_to_csr(table, lens)


def block_table_to_req_to_token_(
    req_to_token: Tensor,
    req_pool_indices: Tensor | Sequence[int],
    block_table: Tensor,
    *,
    page_size: int = 1,
) -> None:
    """Write an edited table (`compact_paged_kv_(..., edit_table=True)`) into SGLang's req_to_token.

    What lies behind a sequence's pages becomes the slot of padding.
    """
    slots = block_table
    if page_size > 1:
        offsets = torch.arange(page_size, dtype=block_table.dtype, device=block_table.device)
        slots = (block_table[:, :, None] * page_size + offsets).flatten(1)
    slots = slots[:, : req_to_token.shape[1]].clamp_min(SLOT_OF_PADDING).to(req_to_token.dtype)
    rows = _on(req_pool_indices, req_to_token)
    req_to_token[:, : slots.shape[1]].index_copy_(0, rows, slots)


def trtllm_offsets_to_block_table(offsets: Tensor) -> Tensor:
    """TensorRT-LLM's K-plane offsets [B, max_blocks] to pages of `[pages, 2, H, tokens, D]`.

    They count planes, of which a page has two: what its own `sparse_kv_cache_compact_layers` takes
    for the pools of its second cache manager.
    """
    return offsets // 2


def _on(indices: Tensor | Sequence[int], like: Tensor) -> Tensor:
    if not isinstance(indices, Tensor):
        indices = torch.tensor(list(indices), dtype=torch.int64)
    return indices.to(like.device, non_blocking=True)


def _host(values: Sequence[int], name: str) -> list[int]:
    if isinstance(values, Tensor):
        if values.device.type != "cpu":
            raise TypeError(f"{name}: expected host ints, got a tensor on {values.device}")
        return values.tolist()
    return list(values)
