"""downsample and downsample_many in Triton against the reference, bit for bit."""

import pytest
import torch
from cases.segment_tables import FakeStage, image_stage, stage_of, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from test_downsample import (
    DTYPES,
    STRIDES,
    TRAILING,
    bits,
    random_bits,
    same_bits,
    strided_rows,
)

from adsc_kernels import ops, reference
from adsc_kernels.backend import backend, resolve


@pytest.fixture(autouse=True, scope="module")
def on_triton():
    with backend("triton"):
        assert resolve(torch.device("cpu")) == "triton"
        yield


@settings(max_examples=90, deadline=None)
@given(
    stage=stages(max_sequences=3, max_length=20),
    dtype=st.sampled_from(DTYPES),
    trailing=st.sampled_from(TRAILING),
    kind=st.sampled_from(STRIDES),
    offset=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_equals_reference(
    stage: FakeStage,
    dtype: torch.dtype,
    trailing: tuple[int, ...],
    kind: str,
    offset: int,
    seed: int,
) -> None:
    """With x beginning anywhere, so that no access may be wider than the element."""
    rows = random_bits(stage.num_tokens_in + offset, trailing, dtype, seed)
    x = strided_rows(rows, kind)[offset:]
    before, table = bits(x).clone(), stage.segments.clone()
    out = ops.downsample(x, stage)
    assert out.is_contiguous()
    assert same_bits(out, reference.downsample(x, stage))
    assert torch.equal(bits(x), before)
    assert torch.equal(stage.segments, table)

    indices = torch.tensor(reference.source_rows(stage), dtype=torch.int64)
    for width in (torch.int32, torch.int64):
        assert same_bits(ops.downsample(x, keep_indices=indices.to(width)), out)


@settings(max_examples=30, deadline=None)
@given(
    stage=stages(max_sequences=2, max_length=20),
    kinds=st.lists(st.sampled_from(STRIDES), min_size=1, max_size=6),
)
def test_many_equals_one_by_one(stage: FakeStage, kinds: list[str]) -> None:
    xs = [
        strided_rows(random_bits(stage.num_tokens_in, TRAILING[i], DTYPES[3 * i], i), kind)
        for i, kind in enumerate(kinds)
    ]
    outs = ops.downsample_many(xs, stage)
    for out, wanted in zip(outs, reference.downsample_many(xs, stage), strict=True):
        assert same_bits(out, wanted)


@pytest.mark.parametrize("width", [1000, 1024, 1500, 3000], ids="{} words".format)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
def test_wide_rows(width: int, dtype: torch.dtype) -> None:
    """More than one tile across a row, full and not, among tensors of other widths."""
    stage = image_stage(text=3, vision=12, kept=4)
    x = random_bits(stage.num_tokens_in, (width,), dtype, width)
    positions = torch.arange(stage.num_tokens_in)
    outs = ops.downsample_many([positions, x, positions], stage)
    for out, wanted in zip(
        outs, reference.downsample_many([positions, x, positions], stage), strict=True
    ):
        assert same_bits(out, wanted)


def test_more_rows_than_a_tile_has() -> None:
    stage = image_stage(3)
    x = torch.arange(stage.num_tokens_in, dtype=torch.int16)
    assert torch.equal(ops.downsample(x, stage), reference.downsample(x, stage))


def test_rows_far_apart() -> None:
    """A stride that takes the last row past 2^32 bytes, of which only two rows are ever touched."""
    storage = torch.empty((1 << 32) + (1 << 20), dtype=torch.uint8)
    x = storage.as_strided((3, 8), (1 << 31, 1))
    x[0], x[2] = 1, 7
    assert ops.downsample(x, keep_indices=torch.tensor([2, 0]))[:, 0].tolist() == [7, 1]


def test_rows_past_the_last_that_moves_are_zero() -> None:
    """Where the number of rows is an upper bound, as with a rebuilt table in a captured graph."""
    x = torch.arange(1, 21)[:10]  # what lies behind it is not to be read
    table = [[0, 0, 4, 2, 0, 0], [2, 4, 6, 6, 0, 0]]
    out = ops.downsample(x, stage_of(table, 11, 10))
    assert out.tolist() == [1, 3, 5, 6, 7, 8, 9, 10, 0, 0, 0]


def test_conjugate_views_are_resolved() -> None:
    x = random_bits(6, (2,), torch.complex64, 3).nan_to_num()
    rows = torch.tensor([5, 0])
    assert torch.equal(ops.downsample(x.conj(), keep_indices=rows), x[rows].conj())
