"""Run with ADSC_CHECK=1 by test_simt_checks.py: on tables with wrong entries the CUDA kernels, run
on a CPU, trap before they touch memory outside; on valid ones they agree with the CPU kernels."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from cases.compact import Blocks
from cases.compact import blocks as block_cases
from cases.rebuild_metadata import fractions, layouts
from cases.refused import BY_THE_OP
from cases.segment_tables import FakeStage, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import Schedule, emulated, schedules
from torch import Tensor

from adsc_kernels import ops  # noqa: F401 (registers the CPU's ops)

wrong = st.one_of(st.integers(-5, 60), st.sampled_from([-(2**31), 2**31 - 1, 10**9]))
edits = st.lists(st.tuples(st.integers(0, 10**6), wrong), max_size=2)
seen = {"trap": 0, "valid": 0}


def edited(table: Tensor, changes: list[tuple[int, int]]) -> Tensor:
    table = table.clone()
    for place, value in changes:
        if table.numel():
            table.view(-1)[place % table.numel()] = value
    return table


def check(name: str, arguments: tuple, argument_names: str, schedule: Schedule) -> None:
    try:
        want = getattr(torch.ops.adsc_kernels, name)(*arguments)
    except BY_THE_OP:
        want = None
    try:
        with emulated(schedule, *(x for x in arguments if isinstance(x, Tensor))):
            out = getattr(torch.ops.adsc_simt, name)(*arguments)
    except RuntimeError as error:
        if want is None and any(f"trap: {known}" in str(error) for known in argument_names.split()):
            seen["trap"] += 1
            return
        raise
    seen["valid"] += 1
    if want is not None:  # what only the host refuses does no harm
        outs, wants = (out, want) if isinstance(out, list) else ([out], [want])
        assert all(map(torch.equal, outs, wants))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(stages(max_length=12), edits, schedules)
def segments(stage: FakeStage, changes: list[tuple[int, int]], schedule: Schedule) -> None:
    x = torch.arange(stage.num_tokens_in * 3.0).reshape(-1, 3)
    table = edited(stage.segments, changes)
    check("downsample", (x, table, None, stage.num_tokens), "segments", schedule)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.integers(0, 9), wrong), min_size=1, max_size=20), schedules)
def keep_indices(rows: list[int], schedule: Schedule) -> None:
    x = torch.arange(30.0).reshape(10, 3)
    check("downsample", (x, None, torch.tensor(rows), len(rows)), "keep_indices", schedule)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(layouts(), fractions, edits, edits, schedules)
def layout(
    drawn: tuple[Tensor, Tensor],
    keep: Fraction,
    bounds: list[tuple[int, int]],
    changes: list[tuple[int, int]],
    schedule: Schedule,
) -> None:
    rows = int(drawn[0][-1])
    x = torch.arange(rows * 2.0).reshape(-1, 2)
    cu_seqlens, spans = edited(drawn[0], bounds), edited(drawn[1][:, :3].contiguous(), changes)
    boundary = (list(keep.as_integer_ratio()), "start", 0, rows)
    arguments = (x, None, None, 1e-5, [], None, None, cu_seqlens, spans, *boundary)
    check("boundary_step", arguments, "cu_seqlens spans", schedule)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(block_cases(outside=True), schedules)
def blocks(drawn: Blocks, schedule: Schedule) -> None:
    """A block outside of the pool, shared, or read-only and written: no byte is written before."""

    def op(*arguments: Any) -> Any:
        caches, *rest = arguments
        inputs = [x for x in rest if isinstance(x, Tensor)]
        with emulated(schedule, *inputs, writable=tuple(caches)):
            return torch.ops.adsc_simt.compact_paged_kv_(*arguments)

    refused = drawn.check_refused_alike(
        op, lambda name: pytest.raises(RuntimeError, match=f"trap: {name}:")
    )
    seen["trap" if refused else "valid"] += 1


if __name__ == "__main__":
    for run in (segments, keep_indices, layout, blocks):
        seen.update(trap=0, valid=0)
        run()
        assert min(seen.values()) > 10, seen
        print(run.__name__, seen)
