# mypy: allow-untyped-defs, allow-incomplete-defs
"""A decoder layer's pointwise work: RoPE with the write into the cache, and SiLU times up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from adsc_kernels.triton.address import rows_at
from adsc_kernels.triton.launch import cdiv, next_power_of_2, start

if TYPE_CHECKING:
    from adsc_kernels.pointwise import Place, Rope

_HEADS = 8  # of a row, at most, in a program
_WARPS = 2  # then with 8 elements of each half of a head of 128 for each thread
_BLOCK = 1024  # elements of a program


@triton.jit
def rotate_kernel(
    qkv, cos, sin, rows, k_cache, v_cache, stride, k_stride, v_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr, WRITE: tl.constexpr, BY_ADDRESS: tl.constexpr,
):  # fmt: skip
    """One program rotates some heads of a row in place. Strides count elements between rows.

    HEADS: of queries, keys and values; the last KV_HEADS are values, the same number before them
    keys. WRITE: to row `rows[row]` of the caches, and nowhere where that is negative. BY_ADDRESS:
    the caches lie where int64 `k_cache` and `v_cache` say.
    """
    SIZE: tl.constexpr = 2 * HALF
    GROUPS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    row = tl.program_id(0).to(tl.int64) // GROUPS
    head = tl.program_id(0) % GROUPS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head < HEADS) & (column < HALF)
    place = qkv + row * stride + head * SIZE + column
    low = tl.load(place, mask=inside, other=0)
    high = tl.load(place + HALF, mask=inside, other=0)
    turned = inside & (head < HEADS - KV_HEADS)
    table = row * SIZE + column
    cosine_low = tl.load(cos + table, mask=turned, other=1).to(tl.float32)
    cosine_high = tl.load(cos + table + HALF, mask=turned, other=1).to(tl.float32)
    sine_low = tl.load(sin + table, mask=turned, other=0).to(tl.float32)
    sine_high = tl.load(sin + table + HALF, mask=turned, other=0).to(tl.float32)
    wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
    new_low = (wide_low * cosine_low + wide_high * sine_low).to(low.dtype)
    new_high = (wide_high * cosine_high + wide_low * sine_high).to(low.dtype)
    is_value = head >= HEADS - KV_HEADS  # bit for bit
    low, high = tl.where(is_value, low, new_low), tl.where(is_value, high, new_high)
    tl.store(place, low, mask=turned)
    tl.store(place + HALF, high, mask=turned)
    if WRITE:
        to = tl.load(rows + row)
        inside = tl.where(to >= 0, inside, False)
        k_cache = rows_at(k_cache, qkv, BY_ADDRESS)
        v_cache = rows_at(v_cache, qkv, BY_ADDRESS)
        is_key = inside & (head >= HEADS - 2 * KV_HEADS) & (head < HEADS - KV_HEADS)
        key = k_cache + to * k_stride + (head - (HEADS - 2 * KV_HEADS)) * SIZE + column
        tl.store(key, low, mask=is_key)
        tl.store(key + HALF, high, mask=is_key)
        value = v_cache + to * v_stride + (head - (HEADS - KV_HEADS)) * SIZE + column
        tl.store(value, low, mask=inside & is_value)
        tl.store(value + HALF, high, mask=inside & is_value)


def rotate_(qkv: Tensor, rope: Rope, num_kv_heads: int, place: Place | None) -> None:
    """See `adsc_kernels.pointwise.rotate`; q and k are rotated where they lie."""
    num_rows, heads, size = qkv.shape
    if num_rows == 0:
        return
    block_heads = min(_HEADS, next_power_of_2(heads))
    k, v, rows = (qkv, qkv, qkv) if place is None else place
    by_address = place is not None and k.dim() == 1
    strides = (num_kv_heads * size,) * 2 if by_address else (k.stride(0), v.stride(0))
    start(
        rotate_kernel,
        num_rows * cdiv(heads, block_heads),
        qkv.device,
        (qkv, *rope, rows, k, v, qkv.stride(0), *strides),
        HEADS=heads,
        KV_HEADS=num_kv_heads,
        HALF=size // 2,
        BLOCK_HEADS=block_heads,
        BLOCK=next_power_of_2(size // 2),
        WRITE=place is not None,
        BY_ADDRESS=by_address,
        num_warps=_WARPS,
    )


@triton.jit
def silu_mul_kernel(gate_up, out, stride, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """One program makes BLOCK elements of a row."""
    ACROSS: tl.constexpr = (INNER + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64) // ACROSS
    column = tl.program_id(0) % ACROSS * BLOCK + tl.arange(0, BLOCK)
    inside = column < INNER
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * stride + INNER + column, mask=inside, other=0).to(tl.float32)
    made = gate * tl.sigmoid(gate) * up
    tl.store(out + row * INNER + column, made.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `adsc_kernels.pointwise.silu_mul`."""
    num_rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((num_rows, inner))
    block = min(_BLOCK, next_power_of_2(inner))
    if num_rows > 0:
        programs = num_rows * cdiv(inner, block)
        arguments = (gate_up, out, gate_up.stride(0))
        start(silu_mul_kernel, programs, out.device, arguments, INNER=inner, BLOCK=block)
    return out
