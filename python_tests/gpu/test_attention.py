"""Every backend of attention that is installed, against float32 written out.

In 16 bits each may be twice as far off as PyTorch's own math in the same dtype.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from gpu_device import DEVICE
from torch import Tensor

from adsc_kernels.attention import CachedKeys, varlen_attention
from adsc_kernels.attention_backends import BACKENDS, DECODE, PREFILL

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
