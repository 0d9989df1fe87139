"""The CUDA downsample and downsample_many, run on a CPU, against the reference bit for bit.

The emulator reports on its own whatever a kernel touches outside of its arguments' rows.
"""

import pytest
import torch
from cases.downsample import Rows, check, check_many, drawn_rows
from cases.row_bits import random_bits
from cases.segment_tables import FakeStage, image_stage, stage_of, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import Schedule, emulating, needs_simt, schedules

from adsc_kernels import ops

pytestmark = needs_simt

WIDTHS = [0, 4, 128, 520, 1040, 2056, 4096, 5120, 8200]
DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex128]
TRAILING = [(), (1,), (3,), (8,), (2, 3), (16,), (33,), (128,), (0,)]
rows = drawn_rows(DTYPES, TRAILING)


@settings(max_examples=60, deadline=None)
@given(stages(max_length=20), rows, schedules)
def test_equals_reference(stage: FakeStage, drawn: Rows, schedule: Schedule) -> None:
    check(stage, drawn.make(stage.num_tokens_in), emulating(schedule))


@settings(max_examples=40, deadline=None)
@given(stages(max_length=20), st.lists(rows, min_size=1, max_size=6), schedules)
def test_many_equals_reference(stage: FakeStage, drawn: list[Rows], schedule: Schedule) -> None:
    check_many(stage, [x.make(stage.num_tokens_in) for x in drawn], emulating(schedule))


@pytest.mark.parametrize("trailing", [(4096,), (2047,), (1,)])
def test_an_image_in_a_prompt(trailing: tuple[int, ...]) -> None:
    stage = image_stage(2, text=9, vision=100, kept=25)
    x = random_bits(stage.num_tokens_in, trailing, torch.bfloat16, 0)
    check(stage, x, emulating((1, 0, 1)))


@settings(max_examples=15, deadline=None)
@given(
    stages(max_length=20),
    st.sampled_from([2048, 2056, 3584, 4096, 5120, 8192, 8200]),
    st.sampled_from([0, 8, 3]),
    schedules,
)
def test_wide_rows(stage: FakeStage, width: int, gap: int, schedule: Schedule) -> None:
    """Around what a block takes a row at a time, packed, with gaps, and not aligned."""
    x = random_bits(stage.num_tokens_in, (width + gap,), torch.bfloat16, 0)[:, :width]
    check(stage, x, emulating(schedule))


@settings(max_examples=25, deadline=None)
@given(
    stages(max_length=20),
    st.lists(
        st.sampled_from([0, 4, 128, 520, 1040, 2056, 4096, 5120, 8200]), min_size=2, max_size=6
    ),
    schedules,
)
def test_wide_rows_beside_narrow(stage: FakeStage, widths: list[int], schedule: Schedule) -> None:
    """Some take a block each, with all threads or with half, and some are cut into tiles."""
    count = stage.num_tokens_in
    xs = [random_bits(count, (width,), torch.bfloat16, i) for i, width in enumerate(widths)]
    check_many(stage, xs, emulating(schedule))


@pytest.mark.parametrize("count", [33, 1100])
def test_wide_rows_of_many_segments(count: int) -> None:
    table = [[i, 2 * i, 1, 1, 0, 0] for i in range(count)]
    x = random_bits(2 * count, (2048,), torch.bfloat16, 0)
    out = emulating((2, 0, 2000))(ops.downsample, x, stage_of(table, count, 2 * count))
    assert torch.equal(out.view(torch.int16), x[::2].view(torch.int16))


def test_thousands_of_segments() -> None:
    table = [[i, 2 * i, 1, 1, 0, 0] for i in range(3000)]
    stage = stage_of(table, 3000, 6000)
    x = torch.arange(6000, dtype=torch.int32)
    out = emulating((2, 0, 2000))(ops.downsample, x, stage)
    assert torch.equal(out, x[::2])
