"""What a decoder layer does between GEMM and attention, each in one launch where Triton runs.

Elsewhere, and where a gradient is wanted, the same in PyTorch's own ops.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adsc_kernels.backend import triton_runs
from adsc_kernels.errors import UnsupportedError


class Rope(NamedTuple):
    """Of each row's position, [T, 1, D]; `sin` is negative in the first half of a head."""

    cos: Tensor
    sin: Tensor


class Place(NamedTuple):
    """Where a chunk's keys and values go: rows `rows`, int64 [T], of a layer's [rows, H_kv, D].

    Where Triton runs, k and v may be int64 [1] that hold the addresses of such rows in their place,
    as a graph reads them anew; and a row below 0 is one to be written nowhere.
    """

    k: Tensor
    v: Tensor
    rows: Tensor


def rotate(
    qkv: Tensor, rope: Rope, num_kv_heads: int, place: Place | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys rotated by their positions, keys and values written to the cache.

    qkv: [T, Hq + 2 * Hkv, D], as one GEMM makes them; it may be overwritten. Returns q
    [T, Hq, D], k and v [T, Hkv, D], which may be views of it.
    """
    num_rotated = qkv.shape[1] - num_kv_heads
    split = [num_rotated - num_kv_heads, num_rotated]
    if _fused(qkv):
        from adsc_kernels.triton.pointwise import rotate_

        rotate_(qkv, rope, num_kv_heads, place)
        q, k, v = qkv.tensor_split(split, dim=1)
        return q, k, v
    qk, v = qkv.tensor_split(split[1:], dim=1)
    low, high = qk.chunk(2, dim=-1)
    qk = torch.addcmul(qk * rope.cos, torch.cat((high, low), dim=-1), rope.sin)
    q, k = qk.tensor_split(split[:1], dim=1)
    if place is not None:
        if place.k.dim() == 1:
            raise UnsupportedError("place: expected rows where Triton doesn't run, got addresses")
        place.k.index_copy_(0, place.rows, k)
        place.v.index_copy_(0, place.rows, v)
    return q, k, v


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, of [T, 2 * inner] to [T, inner]."""
    if _fused(gate_up):
        from adsc_kernels.triton import pointwise

        return pointwise.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _fused(x: Tensor) -> bool:
    """The kernels compute in float32, and have no gradient."""
    wanted = x.requires_grad and torch.is_grad_enabled()
    return x.dtype != torch.float64 and not wanted and triton_runs(x.device)
