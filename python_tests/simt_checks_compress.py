"""Run with ADSC_CHECK=1 by test_simt_checks.py: where either part of a compress_step has a wrong
entry, the CUDA op, run on a CPU, traps before it writes a row or a cache."""

import torch
from cases.refused import BY_THE_OP
from cases.segment_tables import FakeStage, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import Schedule, emulated, schedules
from simt_checks import edited, edits, seen
from torch import Tensor

from adsc_kernels import ops  # noqa: F401 (registers the CPU's ops)

LENGTH, KEPT = 14, [0, 3, 4, 9]


def arguments_of(table: Tensor, stage: FakeStage, rows: Tensor, paged: bool) -> list:
    hidden = torch.arange(stage.num_tokens_in * 3.0).reshape(-1, 3)
    boundary = [hidden, None, None, 1e-6, [], table, None, None, None, [], "start", 0]
    cache = torch.arange(LENGTH * 2.0).reshape(-1, 2, 1, 2) if paged else None
    if cache is None:
        cache = torch.arange(LENGTH * 2.0).reshape(1, -1, 1, 2)
    block_table = torch.arange(LENGTH // 2).flip(0)[None] if paged else None
    lens = torch.tensor([LENGTH])
    way = [None, rows[None, None], torch.tensor([0, len(KEPT)]), None, None, lens, None]
    outs = [torch.full((stage.num_tokens, 3), 7.0)]
    return [*boundary, stage.num_tokens, [cache], 1, block_table, 2, *way, False, None, "NHD", outs]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(stages(max_length=12), edits, edits, st.booleans(), schedules)
def both(
    stage: FakeStage,
    segments: list[tuple[int, int]],
    indices: list[tuple[int, int]],
    paged: bool,
    schedule: Schedule,
) -> None:
    table, rows = edited(stage.segments, segments), edited(torch.tensor(KEPT), indices)
    wanted, got = (arguments_of(table, stage, rows, paged) for _ in range(2))
    try:
        torch.ops.adsc_kernels.compress_step(*wanted)
        refused = False
    except BY_THE_OP:
        refused = True
    written = [*got[13], *got[-1]]
    saved = [x.clone() for x in written]
    inputs = [x for x in got if isinstance(x, Tensor)]
    try:
        with emulated(schedule, *inputs, writable=tuple(written)):
            torch.ops.adsc_simt.compress_step(*got)
    except RuntimeError as error:
        known = "trap: segments" in str(error) or "trap: keep_indices" in str(error)
        if not refused or not known or not all(map(torch.equal, written, saved)):
            raise
        seen["trap"] += 1
        return
    seen["valid"] += 1
    if not refused:  # what only the host refuses does no harm
        assert all(map(torch.equal, written, [*wanted[13], *wanted[-1]]))


if __name__ == "__main__":
    seen.update(trap=0, valid=0)
    both()
    assert min(seen.values()) > 10, seen
    print(seen)
