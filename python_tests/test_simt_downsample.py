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


def test_thousands_of_segments() -> None:
    table = [[i, 2 * i, 1, 1, 0, 0] for i in range(3000)]
    stage = stage_of(table, 3000, 6000)
    x = torch.arange(6000, dtype=torch.int32)
    out = emulating((2, 0, 2000))(ops.downsample, x, stage)
    assert torch.equal(out, x[::2])
