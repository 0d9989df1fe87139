"""Attention of a decode step in Triton against attention written out, in float64."""

import pytest
import torch
from torch import Tensor

from adsc_kernels.attention import CachedKeys
from adsc_kernels.triton.decode_attention import decode_attention, shares_of

# Of bfloat16 the interpreter multiplies the bits: a GPU has it (gpu/test_attention.py).
ERROR = {torch.float32: 1e-6, torch.float16: 2**-10}


def exact(q: Tensor, k: Tensor, v: Tensor, keys: CachedKeys, scale: float) -> Tensor:
    out = []
    for row, start, length in zip(q.double(), keys.starts, keys.lens, strict=True):
        mine = slice(start, start + length)
        some_k, some_v = (x[mine].double().repeat_interleave(len(row) // x.shape[1], 1)
                          for x in (k, v))  # fmt: skip
        scores = torch.einsum("hd,khd->hk", row, some_k) * scale
        out.append(torch.einsum("hk,khd->hd", scores.softmax(-1), some_v))
    return torch.stack(out)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(2, 2, 16), (6, 2, 24), (4, 1, 8)])
@pytest.mark.parametrize("shares", [1, 4])
def test_decode(dtype: torch.dtype, heads: int, kv_heads: int, size: int, shares: int) -> None:
    torch.manual_seed(heads + shares)
    lens, capacities = (130, 1, 64, 200), (131, 4, 64, 230)
    keys = CachedKeys.build((1,) * 4, lens, capacities, torch.device("cpu"))
    qkv = torch.randn(4, heads + 2, size).to(dtype)
    q = qkv[:, :heads]  # a part of wider rows, as one GEMM makes them
    k, v = torch.randn(2, sum(capacities), kv_heads, size).to(dtype)
    k[130], v[130] = torch.nan, torch.nan  # nobody's
    got = decode_attention(q, k, v, keys.cu_seqlens_k, max(lens), 0.3, shares)
    truth = exact(q, k, v, keys, 0.3)
    assert got.dtype is dtype
    assert float((got - truth).abs().max()) <= ERROR[dtype] * float(truth.abs().max()) * 2
    # By its address another cache is read than the one that shows the form, and to the same bits.
    address, form = torch.tensor([k.data_ptr(), v.data_ptr()]), torch.full_like(k, torch.nan)
    options = (keys.cu_seqlens_k, max(lens), 0.3, shares)
    assert torch.equal(decode_attention(q, form, form, *options, address=address), got)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("shares", [1, 2])
@pytest.mark.parametrize("size", [1, 16, 24])
def test_decode_over_blocks(dtype: torch.dtype, shares: int, size: int) -> None:
    """To the bits of rows that lie together, from blocks in any order."""
    torch.manual_seed(size)
    lens = (130, 1, 70)
    q, k, v = torch.randn(3, 4, 8).to(dtype), *torch.randn(2, sum(lens), 2, 8).to(dtype)
    counts = [-(-n // size) for n in lens]
    order, table = torch.randperm(sum(counts)).int(), torch.full((3, max(counts)), -1).int()
    paged = torch.full((2, sum(counts) * size, 2, 8), torch.nan, dtype=dtype)
    rows = zip(lens, order.split(counts), k.split(lens), v.split(lens), strict=True)
    for b, (n, blocks, some_k, some_v) in enumerate(rows):
        table[b, : len(blocks)] = blocks
        slots = blocks.long()[torch.arange(n) // size] * size + torch.arange(n) % size
        paged[0, slots], paged[1, slots] = some_k, some_v
    keys = CachedKeys.build((1,) * 3, lens, lens, torch.device("cpu"))
    want = decode_attention(q, k, v, keys.cu_seqlens_k, max(lens), 0.3, shares)
    bounds = torch.tensor([0, 130, 0, 1, 0, 70, 0], dtype=torch.int32)
    options = (bounds, max(lens), 0.3, shares)
    assert torch.equal(decode_attention(q, *paged, *options, blocks=(table, size)), want)
    address = torch.tensor([x.data_ptr() for x in paged])
    given = {"address": address, "blocks": (table, size)}
    assert torch.equal(decode_attention(q, k, v, *options, **given), want)


def test_shares() -> None:
    assert shares_of(32, 3000, 132) == 8  # one sequence of 32 heads
    assert shares_of(32, 700, 132) == 4  # no shorter than 128 keys
    assert shares_of(8, 3000, 132) == 16
    assert shares_of(1024, 3000, 132) == 1
    assert shares_of(1, 5, 132) == 1
