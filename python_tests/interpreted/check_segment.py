"""The keep rule and the lookup in Triton against csrc/segment.h and the reference."""

import itertools
import random

import torch
import triton
import triton.language as tl
from cases.segment_tables import FakeStage, by_stage, stages
from hypothesis import given, settings

from adsc_kernels import _C, reference
from adsc_kernels.triton.segment import RowMap, kept_count, kept_index, source_rows


@triton.jit
def kept_index_kernel(pattern, j, n, m, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    index = kept_index(tl.load(pattern + at), tl.load(j + at), tl.load(n + at), tl.load(m + at))
    tl.store(out + at, index)


@triton.jit
def kept_count_kernel(n, numerator, denominator, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    count = kept_count(tl.load(n + at), tl.load(numerator + at), tl.load(denominator + at))
    tl.store(out + at, count)


@triton.jit
def source_rows_kernel(
    table, out, found_out, count, steps, num_tokens, num_rows, SIZE: tl.constexpr
):
    row = tl.arange(0, SIZE).to(tl.int64)
    row_map = RowMap(table, count, steps, num_tokens, num_rows, False)
    source, found = source_rows(row_map, row, True)
    tl.store(out + row, source, mask=found)
    tl.store(found_out + row, found)


def columns(rows: list[tuple[int, ...]], dtype: torch.dtype) -> tuple[list[torch.Tensor], int]:
    """The rows as columns, filled up with the last row to a power of two."""
    size = triton.next_power_of_2(len(rows))
    rows = rows + [rows[-1]] * (size - len(rows))
    return [torch.tensor(column, dtype=dtype) for column in zip(*rows, strict=True)], size


def test_kept_index_on_all_small_spans() -> None:
    cases = [
        (pattern, j, n, m)
        for pattern in range(3)
        for n in range(1, 21)
        for m in range(1, n + 1)
        for j in range(m)
    ]
    arguments, size = columns(cases, torch.int32)
    out = torch.full((size,), -1, dtype=torch.int64)
    kept_index_kernel[(1,)](*arguments, out, SIZE=size)
    wanted = [_C.kept_index(*case) for case in cases]
    assert out[: len(cases)].tolist() == wanted


def test_kept_index_at_the_end_of_int32() -> None:
    chance = random.Random(0)
    top = (1 << 31) - 1
    cases = [(p, m - 1, n, m) for p in range(3) for n in (top, top - 1) for m in (n, n - 1, n // 2)]
    for _ in range(200):
        n = chance.randint(1, top)
        m = chance.randint(1, n)
        cases.append((chance.randrange(3), chance.randrange(m), n, m))
    arguments, size = columns(cases, torch.int32)
    out = torch.full((size,), -1, dtype=torch.int64)
    kept_index_kernel[(1,)](*arguments, out, SIZE=size)
    wanted = [_C.kept_index(*case) for case in cases]
    assert out[: len(cases)].tolist() == wanted


def test_kept_count() -> None:
    cases = [(n, a, b) for n, b in itertools.product(range(15), range(1, 9)) for a in range(b + 1)]
    cases += [((1 << 31) - 1, (1 << 31) - 2, (1 << 31) - 1), ((1 << 31) - 1, 1, 3)]
    arguments, size = columns(cases, torch.int64)
    out = torch.full((size,), -1, dtype=torch.int64)
    kept_count_kernel[(1,)](*arguments, out, SIZE=size)
    assert out[: len(cases)].tolist() == [_C.kept_count(*case) for case in cases]


@settings(max_examples=25, deadline=None)
@given(stage=stages())
def test_source_rows(stage: FakeStage) -> None:
    wanted = reference.source_rows(*by_stage(stage))
    count = len(stage.segments)
    if not wanted:
        return
    size = triton.next_power_of_2(len(wanted) + 8)  # and rows after the last
    out = torch.full((size,), -1, dtype=torch.int64)
    found = torch.zeros(size, dtype=torch.bool)
    steps = (count - 1).bit_length()
    source_rows_kernel[(1,)](
        stage.segments, out, found, count, steps, len(wanted), stage.num_tokens_in, SIZE=size
    )
    assert out[: len(wanted)].tolist() == wanted
    assert found.tolist() == [True] * len(wanted) + [False] * (size - len(wanted))
