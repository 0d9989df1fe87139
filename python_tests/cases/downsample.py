"""What downsample and downsample_many do with drawn rows: those of the reference, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels import ops
from cases.row_bits import (
    DTYPES,
    STRIDES,
    TRAILING,
    bits,
    random_bits,
    same_bits,
    shifted,
    strided_rows,
)
from cases.run import Run, reference
from cases.segment_tables import FakeStage, source_rows, stage_of


@dataclass(frozen=True)
class Rows:
    """A tensor but for the number of its rows. offset: elements that it begins off alignment."""

    dtype: torch.dtype
    trailing: tuple[int, ...]
    stride: str
    offset: int
    seed: int

    def make(self, rows: int) -> Tensor:
        x = strided_rows(random_bits(rows, self.trailing, self.dtype, self.seed), self.stride)
        return x if self.stride == "one row, expanded" else shifted(x, self.offset)


def drawn_rows(
    dtypes: list[torch.dtype] = DTYPES,
    trailing: list[tuple[int, ...]] = TRAILING,
    strides: list[str] = STRIDES,
) -> st.SearchStrategy[Rows]:
    offsets, seeds = st.sampled_from([0, 0, 1, 2, 3, 4]), st.integers(0, 2**31)
    sampled = map(st.sampled_from, (dtypes, trailing, strides))
    return st.builds(Rows, *sampled, offsets, seeds)


def sources(stage: FakeStage, *widths: torch.dtype) -> list[dict[str, Any]]:
    """Ways to say which rows survive: the stage, and a list of indices of each width."""
    rows = source_rows(stage)
    lists = [{"keep_indices": torch.tensor(rows, dtype=width)} for width in widths]
    return [{"stage": stage}, *lists]


def check(stage: FakeStage, x: Tensor, run: Run) -> None:
    before, table = bits(x).clone(), stage.segments.clone()
    wanted = reference(ops.downsample, x, stage)
    for source in sources(stage, torch.int32, torch.int64):
        out = run(ops.downsample, x, **source)
        assert out.is_contiguous()
        assert same_bits(out, wanted)
    assert torch.equal(bits(x), before)
    assert torch.equal(stage.segments, table)


def check_many(stage: FakeStage, xs: list[Tensor], run: Run) -> None:
    before = [bits(x).clone() for x in xs]
    wanted = reference(ops.downsample_many, xs, stage)
    for source in sources(stage, torch.int32):
        outs = run(ops.downsample_many, tuple(xs), **source)
        assert isinstance(outs, list)
        assert all(same_bits(out, truth) for out, truth in zip(outs, wanted, strict=True))
    assert all(torch.equal(bits(x), old) for x, old in zip(xs, before, strict=True))


def check_conjugate_views(run: Run) -> None:
    x = random_bits(6, (2,), torch.complex64, 3).nan_to_num()
    rows = torch.tensor([5, 0])
    assert torch.equal(run(ops.downsample, x.conj(), keep_indices=rows), x[rows].conj())


def check_rows_far_apart(run: Run) -> None:
    """A stride that takes the last row past 2^32 bytes, of which only two rows are ever touched."""
    storage = torch.empty((1 << 32) + (1 << 20), dtype=torch.uint8)
    x = storage.as_strided((3, 8), (1 << 31, 1))
    x[0], x[2] = 1, 7
    out = run(ops.downsample, x, keep_indices=torch.tensor([2, 0]))
    assert out[:, 0].tolist() == [7, 1]


def check_duplicates(dtype: torch.dtype, run: Run) -> None:
    """Gradients are summed in float: 257 ones overflow bfloat16's integers one by one.

    They are taken after the call, so that the backend of the forward counts.
    """
    x = torch.randn(3, 40, dtype=dtype, requires_grad=True)
    run(ops.downsample, x, keep_indices=torch.tensor([1] * 300 + [2])).sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [0, 300, 1]
    assert torch.equal(x.grad, x.grad[:, :1].expand(-1, 40))


def check_no_rows(run: Run) -> None:
    nothing = stage_of([], 0, 0)
    assert run(ops.downsample, torch.empty(0, 3), nothing).shape == (0, 3)
    all_dropped = stage_of([[0, 0, 10, 0, 0, 0]], 0, 10)
    x = torch.zeros(10, 4)
    assert run(ops.downsample, x, all_dropped).shape == (0, 4)
    no_rows = torch.empty(0, dtype=torch.int64)
    assert run(ops.downsample, x, keep_indices=no_rows).shape == (0, 4)
