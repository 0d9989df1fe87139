"""downsample and downsample_many in Triton against the reference, bit for bit."""

import pytest
import torch
from cases.downsample import (
    Rows,
    check,
    check_conjugate_views,
    check_many,
    check_rows_far_apart,
    drawn_rows,
)
from cases.row_bits import DTYPES, STRIDES, TRAILING, random_bits, strided_rows
from cases.run import on
from cases.segment_tables import FakeStage, image_stage, stage_of, stages
from hypothesis import given, settings
from hypothesis import strategies as st

from adsc_kernels import ops
from adsc_kernels.backend import resolve

TRITON = on("triton")


def test_triton_serves() -> None:
    assert TRITON(resolve, torch.device("cpu")) == "triton"


@settings(max_examples=45, deadline=None)
@given(stage=stages(max_sequences=3, max_length=20), rows=drawn_rows())
def test_equals_reference(stage: FakeStage, rows: Rows) -> None:
    check(stage, rows.make(stage.num_tokens_in), TRITON)


@settings(max_examples=15, deadline=None)
@given(
    stage=stages(max_sequences=2, max_length=20),
    kinds=st.lists(st.sampled_from(STRIDES), min_size=1, max_size=6),
)
def test_many_equals_one_by_one(stage: FakeStage, kinds: list[str]) -> None:
    xs = [
        strided_rows(random_bits(stage.num_tokens_in, TRAILING[i], DTYPES[3 * i], i), kind)
        for i, kind in enumerate(kinds)
    ]
    check_many(stage, xs, TRITON)


@pytest.mark.parametrize("width", [1000, 1024, 1500, 3000], ids="{} words".format)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
def test_wide_rows(width: int, dtype: torch.dtype) -> None:
    """More than one tile across a row, full and not, among tensors of other widths."""
    stage = image_stage(text=3, vision=12, kept=4)
    x = random_bits(stage.num_tokens_in, (width,), dtype, width)
    positions = torch.arange(stage.num_tokens_in)
    check_many(stage, [positions, x, positions], TRITON)


def test_more_rows_than_a_tile_has() -> None:
    stage = image_stage(3)
    x = torch.arange(stage.num_tokens_in, dtype=torch.int16)
    check(stage, x, TRITON)


def test_rows_far_apart() -> None:
    check_rows_far_apart(TRITON)


def test_rows_past_the_last_that_moves_are_zero() -> None:
    """Where the number of rows is an upper bound, as with a rebuilt table in a captured graph."""
    x = torch.arange(1, 21)[:10]  # what lies behind it is not to be read
    table = [[0, 0, 4, 2, 0, 0], [2, 4, 6, 6, 0, 0]]
    out = TRITON(ops.downsample, x, stage_of(table, 11, 10))
    assert out.tolist() == [1, 3, 5, 6, 7, 8, 9, 10, 0, 0, 0]


def test_conjugate_views_are_resolved() -> None:
    check_conjugate_views(TRITON)
