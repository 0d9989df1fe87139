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


def test_shares() -> None:
    assert shares_of(32, 3000, 132) == 8  # one sequence of 32 heads
    assert shares_of(32, 700, 132) == 4  # no shorter than 128 keys
    assert shares_of(8, 3000, 132) == 16
    assert shares_of(1024, 3000, 132) == 1
    assert shares_of(1, 5, 132) == 1
