"""The CUDA downsample_add_rms_norm, run on a CPU: the sum bit for bit, the norm by its error."""

import pytest
import torch
from cases.downsample_add_rms_norm import DTYPES, check, check_error, drawn, in_wider_rows
from cases.row_bits import shifted
from cases.segment_tables import FakeStage, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import Schedule, emulating, needs_simt, schedules

pytestmark = needs_simt


@settings(max_examples=60, deadline=None)
@given(
    stage=stages(max_length=12),
    hidden=st.sampled_from([0, 1, 7, 8, 64, 255, 512, 1032]),
    dtype=st.sampled_from(DTYPES),
    offset=st.sampled_from([0, 0, 1, 4]),
    wide=st.booleans(),
    schedule=schedules,
)
def test_equals_reference(
    stage: FakeStage,
    hidden: int,
    dtype: torch.dtype,
    offset: int,
    wide: bool,
    schedule: Schedule,
) -> None:
    x, residual, weight = drawn(stage.num_tokens_in, hidden, dtype)
    if wide:
        x, residual = in_wider_rows(x, residual)
    inputs = shifted(x, offset), residual, shifted(weight, offset)
    norms = check(stage, inputs, emulating(schedule))
    assert all(torch.equal(norm, norms[0]) for norm in norms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 4096, 5121])
def test_error_at_most_twice_pytorchs(dtype: torch.dtype, hidden: int) -> None:
    check_error(16, hidden, dtype, 3.0, emulating((0, 1, 1)))
