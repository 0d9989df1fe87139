"""Every backend of attention that is installed, against float32 written out.

In 16 bits each may be twice as far off as PyTorch's own math in the same dtype.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gpu_device import DEVICE
from torch import Tensor

from adsc_kernels.attention import CachedKeys, varlen_attention
from adsc_kernels.attention_backends import BACKENDS, DECODE, PREFILL
from adsc_kernels.attention_keys import PagedKeys

HEADS = [(8, 8), (8, 2), (28, 4)]


def exact(q: Tensor, k: Tensor, v: Tensor, offset: int) -> Tensor:
    """Of one sequence, in the dtype of its rows: q's row i sees the keys up to i + offset."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
    rows, keys = (torch.arange(n, device=q.device) for n in (len(q), len(k)))
    scores = scores.masked_fill(keys > rows[:, None] + offset, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("phase", [PREFILL, DECODE])
@pytest.mark.parametrize("backend", list(reversed(BACKENDS)))
def test_error(backend: str, phase: str, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    size = 128
    if backend == "cudnn":
        pytest.skip("below, over prompts of one length")
    reason = BACKENDS[backend].why_not(phase, DEVICE, dtype, size)
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(sum(heads))
    q_lens = (1, 1, 1, 1) if phase == DECODE else (1, 65, 0, 300)
    lens, capacities = (700, 65, 1, 3000), (701, 70, 1, 3000)
    cu = torch.tensor([0, *torch.tensor(q_lens).cumsum(0).tolist()], dtype=torch.int32)
    stage = SimpleNamespace(
        cu_seqlens=cu.to(DEVICE), seq_lens=q_lens, max_seqlen=max(q_lens), num_tokens=sum(q_lens)
    )
    wide = torch.randn(sum(q_lens), sum(heads) + heads[1], size, device=DEVICE).to(dtype)
    q = wide[:, : heads[0]]
    k, v = torch.randn(2, sum(capacities), heads[1], size, device=DEVICE).to(dtype)
    keys = CachedKeys.build(q_lens, lens, capacities, DEVICE)
    got = varlen_attention(q, k, v, stage, keys=keys, backend=backend)
    assert got.dtype is dtype
    first = 0
    for start, length, rows in zip(keys.starts, lens, q_lens, strict=True):
        if rows == 0:
            continue
        mine, held = slice(first, first + rows), slice(start, start + length)
        parts = (q[mine], k[held], v[held])
        truth = exact(*(x.double() for x in parts), length - rows)
        limit = 2 * float((exact(*parts, length - rows) - truth).abs().max())
        assert float((got[mine] - truth).abs().max()) <= limit + 1e-6
        first += rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_by_address_and_over_blocks(dtype: torch.dtype) -> None:
    """To the bits of the same keys where they lie together, in the cache of the call."""
    reason = BACKENDS["triton"].why_not(DECODE, DEVICE, dtype, 128)
    if reason is not None:
        pytest.skip(reason)
    lens, size = (700, 65, 1, 3000), 16
    counts = [-(-n // size) for n in lens]
    capacities = [n * size for n in counts]
    stage = SimpleNamespace(
        cu_seqlens=torch.arange(5, dtype=torch.int32, device=DEVICE),
        seq_lens=(1,) * 4,
        max_seqlen=1,
        num_tokens=4,
    )
    q = torch.randn(4, 8, 128, device=DEVICE).to(dtype)
    k, v = torch.randn(2, sum(capacities), 2, 128, device=DEVICE).to(dtype)
    keys = CachedKeys.build((1,) * 4, lens, capacities, DEVICE)
    want = varlen_attention(q, k, v, stage, keys=keys, backend="triton")
    address = torch.tensor([k.data_ptr(), v.data_ptr()], device=DEVICE)
    form = torch.full_like(k, torch.nan)
    there = replace(keys, address=address)
    got = varlen_attention(q, form, form, stage, keys=there, backend="triton")
    assert torch.equal(got, want)
    order = torch.randperm(sum(counts))
    paged = [x.unflatten(0, (-1, size))[order.argsort().to(DEVICE)].flatten(0, 1) for x in (k, v)]
    table = np.full((4, max(counts)), -1, np.int32)
    for b, blocks in enumerate(order.split(counts)):
        table[b, : len(blocks)] = blocks
    blocks = PagedKeys.build(lens, size, table, DEVICE)
    got = varlen_attention(q, *paged, stage, keys=blocks, backend="triton")
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prompts_of_one_length(dtype: torch.dtype) -> None:
    """By cuDNN, which takes no others."""
    reason = BACKENDS["cudnn"].why_not(PREFILL, DEVICE, dtype, 128)
    if reason is not None:
        pytest.skip(reason)
    lens = (300, 300)
    cu = torch.tensor([0, 300, 600], dtype=torch.int32, device=DEVICE)
    stage = SimpleNamespace(cu_seqlens=cu, seq_lens=lens, max_seqlen=300, num_tokens=600)
    q, k, v = torch.randn(600, 24, 128, device=DEVICE).to(dtype).tensor_split(3, dim=1)
    got = varlen_attention(q, k, v, stage, backend="cudnn")
    for mine in (slice(300), slice(300, 600)):
        parts = (q[mine], k[mine], v[mine])
        truth = exact(*(x.double() for x in parts), 0)
        limit = 2 * float((exact(*parts, 0) - truth).abs().max())
        assert float((got[mine] - truth).abs().max()) <= limit + 1e-6
