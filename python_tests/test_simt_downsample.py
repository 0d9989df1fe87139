"""The CUDA downsample and downsample_many, run on a CPU, against the reference bit for bit.

The emulator reports on its own whatever a kernel touches outside of its arguments' rows.
"""

import pytest
import torch
from cases.row_bits import STRIDES, random_bits, same_bits, strided_rows
from cases.segment_tables import FakeStage, image_stage, stage_of, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import Schedule, emulated, guards_intact, needs_simt, schedules, shifted
from torch import Tensor

from adsc_kernels import reference

pytestmark = needs_simt

DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex128]
TRAILING = [(), (1,), (3,), (8,), (2, 3), (16,), (33,), (128,), (0,)]


tensors = st.tuples(
    st.sampled_from(DTYPES),
    st.sampled_from(TRAILING),
    st.sampled_from(STRIDES),
    st.sampled_from([0, 0, 1, 4]),
    st.integers(0, 2**31),
)


def make(rows: int, tensor: tuple) -> Tensor:
    dtype, trailing, kind, offset, seed = tensor
    x = strided_rows(random_bits(rows, trailing, dtype, seed), kind)
    return x if kind == "one row, expanded" else shifted(x, offset)


@settings(max_examples=60, deadline=None)
@given(stages(max_length=20), tensors, schedules)
def test_equals_reference(stage: FakeStage, tensor: tuple, schedule: Schedule) -> None:
    x = make(stage.num_tokens_in, tensor)
    op = torch.ops.adsc_simt.downsample
    want = reference.downsample(x, stage)
    with emulated(schedule, x, stage.segments):
        out = op(x, stage.segments, None, stage.num_tokens)
    assert same_bits(out, want) and guards_intact(out)
    for width in (torch.int32, torch.int64):
        rows = torch.tensor(reference.source_rows(stage), dtype=width)
        with emulated(schedule, x, rows):
            out = op(x, None, rows, stage.num_tokens)
        assert same_bits(out, want) and guards_intact(out)


@settings(max_examples=40, deadline=None)
@given(stages(max_length=20), st.lists(tensors, min_size=1, max_size=6), schedules)
def test_many_equals_reference(stage: FakeStage, drawn: list[tuple], schedule: Schedule) -> None:
    xs = [make(stage.num_tokens_in, tensor) for tensor in drawn]
    with emulated(schedule, *xs, stage.segments):
        outs = torch.ops.adsc_simt.downsample_many(xs, stage.segments, None, stage.num_tokens)
    for out, want in zip(outs, reference.downsample_many(xs, stage), strict=True):
        assert same_bits(out, want) and guards_intact(out)


@pytest.mark.parametrize("trailing", [(4096,), (2047,), (1,)])
def test_an_image_in_a_prompt(trailing: tuple[int, ...]) -> None:
    stage = image_stage(2, text=9, vision=100, kept=25)
    x = random_bits(stage.num_tokens_in, trailing, torch.bfloat16, 0)
    with emulated((1, 0, 1), x, stage.segments):
        out = torch.ops.adsc_simt.downsample(x, stage.segments, None, stage.num_tokens)
    assert same_bits(out, reference.downsample(x, stage)) and guards_intact(out)


def test_thousands_of_segments() -> None:
    table = [[i, 2 * i, 1, 1, 0, 0] for i in range(3000)]
    stage = stage_of(table, 3000, 6000)
    x = torch.arange(6000, dtype=torch.int32)
    with emulated((2, 0, 2000), x, stage.segments):
        out = torch.ops.adsc_simt.downsample(x, stage.segments, None, 3000)
    assert torch.equal(out, x[::2]) and guards_intact(out)
