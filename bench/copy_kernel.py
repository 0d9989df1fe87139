"""A plain copy kernel: what a kernel can reach that moves bytes and does nothing else."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # words of 8 bytes: 256 threads, 4 accesses of 16 bytes each


@triton.jit
def _copy(target, source, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


def copy(target: Tensor, source: Tensor) -> None:
    """Copies int64 words, densely packed."""
    _copy[(triton.cdiv(source.numel(), BLOCK),)](
        target, source, source.numel(), BLOCK=BLOCK, num_warps=8
    )
