"""What a kernel can reach that moves bytes and does nothing else: a plain copy, and a gather whose
rows are given."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # words of 8 bytes: 256 threads, 4 accesses of 16 bytes each
ROW = 1024  # the same for half as many threads: a row of 4096 numbers of 16 bits


@triton.jit
def _copy(target, source, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


@triton.jit
def _gather(target, source, rows, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    of = tl.load(rows + row).to(tl.int64) * count
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + of + at, mask=at < count)
    tl.store(target + row * count + at, values, mask=at < count)


def copy(target: Tensor, source: Tensor) -> None:
    """Copies int64 words, densely packed."""
    _copy[(triton.cdiv(source.numel(), BLOCK),)](
        target, source, source.numel(), BLOCK=BLOCK, num_warps=8
    )


def gather(target: Tensor, source: Tensor, rows: Tensor) -> None:
    """target[i] = source[rows[i]], of int64 words: [N, W], [M, W], and int32 [N]."""
    count = source.shape[1]
    _gather[(len(rows), triton.cdiv(count, ROW))](
        target, source, rows, count, BLOCK=ROW, num_warps=4
    )
