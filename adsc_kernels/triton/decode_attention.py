# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention of one query row of each sequence over its keys in a cache, the keys in shares.

A few long sequences are too few programs for a GPU with a sequence and head each. So each of them
is cut into shares of its keys, whose results a second kernel adds up by their sums of exponentials.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adsc_kernels.triton.address import rows_at
from adsc_kernels.triton.launch import next_power_of_2, start

_BLOCK = 64  # keys at once, at most
_TILE = 1 << 14  # bytes of keys at once, of which three tiles, and of values, fit any GPU's share
_LEAST = 128  # keys of a share, so that it is worth its merging
_MOST = 64  # shares
_WAVES = 2  # programs for each multiprocessor, at least, while shares are long enough
_TWO_LOG = 1.4426950408889634  # exponentials are of base 2


@triton.jit
def attention_shares_kernel(
    q, k, v, bounds, table, out, sums, scale, q_stride, k_stride, v_stride, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, SHARES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
    BY_ADDRESS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One program: a share of a sequence's keys, one key head, the GROUP query heads that ask it.

    bounds: `CachedKeys.cu_seqlens_k`. out [B, heads, SHARES, SIZE] and sums [B, heads, SHARES]: a
    share's own attention and the logarithm of its sum of exponentials, or with one share only the
    attention. Strides count elements between rows. ROWS and COLUMNS: GROUP and SIZE in tiles.
    BY_ADDRESS: the keys and values lie where int64 `k` and `v` say. PAGE: rows of a cache's block,
    if it has any: key r of a sequence is row r % PAGE of block `table[sequence, r // PAGE]`.
    """
    share = tl.program_id(0) % SHARES
    kv_head = tl.program_id(0) // SHARES % KV_HEADS
    sequence = tl.program_id(0) // (SHARES * KV_HEADS)
    k = rows_at(k, q, BY_ADDRESS)
    v = rows_at(v, q, BY_ADDRESS)
    begin = tl.load(bounds + 2 * sequence)
    end = tl.load(bounds + 2 * sequence + 1)
    each = tl.cdiv(tl.cdiv(end - begin, SHARES), BLOCK) * BLOCK
    begin += share * each
    end = tl.minimum(end, begin + each)
    head = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)
    asked = (head < GROUP) & (column[None, :] < SIZE)
    query = q + sequence.to(tl.int64) * q_stride + (kv_head * GROUP + head) * SIZE
    query = tl.load(query + column[None, :], mask=asked, other=0)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    made = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        there = (row[:, None] < end) & (column[None, :] < SIZE)
        held = row.to(tl.int64)
        if PAGE > 0:
            block = table + sequence * table_stride + row // PAGE
            held = tl.load(block, mask=row < end, other=0).to(tl.int64) * PAGE + row % PAGE
        place = kv_head * SIZE + column[None, :]
        key = tl.load(k + held[:, None] * k_stride + place, mask=there, other=0)
        score = tl.dot(query, key.T, input_precision="ieee" if EXACT else None) * scale
        score = tl.where(row[None, :] < end, score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(highest - higher)
        value = tl.load(v + held[:, None] * v_stride + place, mask=there, other=0)
        added = tl.dot(weight.to(value.dtype), value, input_precision="ieee" if EXACT else None)
        made = made * fade[:, None] + added
        total = total * fade + tl.sum(weight, 1)
        highest = higher
    made = made / tl.where(total == 0, 1, total)[:, None]  # a share without keys
    heads = sequence.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + tl.arange(0, ROWS)
    to = out + (heads[:, None] * SHARES + share) * SIZE + column[None, :]
    tl.store(to, made.to(out.dtype.element_ty), mask=asked)
    if SHARES > 1:
        mine = tl.arange(0, ROWS) < GROUP
        tl.store(sums + heads * SHARES + share, highest + tl.log2(total), mask=mine)


@triton.jit
def attention_merge_kernel(
    parts, sums, out, SIZE: tl.constexpr, SHARES: tl.constexpr, COLUMNS: tl.constexpr
):
    """One program: one head of a query row, from its shares."""
    head = tl.program_id(0).to(tl.int64)
    share = tl.arange(0, SHARES)
    column = tl.arange(0, COLUMNS)
    total = tl.load(sums + head * SHARES + share)
    weight = tl.exp2(total - tl.max(total, 0))
    place = (head * SHARES + share[:, None]) * SIZE + column[None, :]
    part = tl.load(parts + place, mask=column[None, :] < SIZE, other=0)
    made = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + head * SIZE + column, made.to(out.dtype.element_ty), mask=column < SIZE)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float,
    shares: int = 0,
    address: Tensor | None = None,
    blocks: tuple[Tensor, int] | None = None,
) -> Tensor:
    """q [B, Hq, D] over caches k, v [rows, Hkv, D]; bounds as `CachedKeys.cu_seqlens_k`.

    Every sequence has a key, and at most `longest`. shares: of its keys, a power of two; 0 chooses.
    address: int64 [2], where caches of the form of k and v lie that are read in their place.
    blocks: the int32 [B, blocks] table of a paged cache, and the rows of a block.
    """
    num_sequences, heads, size = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    shares = shares or shares_of(num_sequences * kv_heads, longest, _processors(q.device))
    out = torch.empty((num_sequences, heads, size), dtype=q.dtype, device=q.device)
    columns = max(16, next_power_of_2(size))
    parts, sums = out, q  # which nobody reads
    if shares > 1:
        parts = q.new_empty((num_sequences, heads, shares, size), dtype=torch.float32)
        sums = q.new_empty((num_sequences, heads, shares), dtype=torch.float32)
    table, page = (bounds, 0) if blocks is None else blocks
    strides = (q.stride(0), k.stride(0), v.stride(0), table.stride(0))
    keys, values = (k, v) if address is None else address.split(1)
    start(
        attention_shares_kernel,
        num_sequences * kv_heads * shares,
        q.device,
        (q, keys, values, bounds, table, parts, sums, scale * _TWO_LOG, *strides),
        KV_HEADS=kv_heads,
        GROUP=group,
        SIZE=size,
        SHARES=shares,
        ROWS=max(16, next_power_of_2(group)),  # the least of a matrix unit
        COLUMNS=columns,
        BLOCK=min(_BLOCK, _TILE // (columns * q.element_size())),
        EXACT=q.dtype is torch.float32,
        BY_ADDRESS=address is not None,
        PAGE=page,
        num_warps=4,
        num_stages=3,
    )
    if shares > 1:
        options: dict[str, Any] = {"SIZE": size, "SHARES": shares, "COLUMNS": columns}
        start(
            attention_merge_kernel, num_sequences * heads, q.device, (parts, sums, out), **options
        )
    return out


def shares_of(programs: int, longest: int, processors: int) -> int:
    """As many shares as fill the GPU, a power of two, none of them too short to be worth it."""
    wanted = min(_WAVES * processors // max(programs, 1), longest // _LEAST, _MOST)
    return 1 << max(wanted.bit_length() - 1, 0) if wanted > 0 else 1


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
