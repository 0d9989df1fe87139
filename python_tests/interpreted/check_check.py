"""ADSC_CHECK=1: a table or a list that leads outside stops the program and names the argument."""

import dataclasses

import pytest
import torch
from cases.compact import Blocks, blocks
from cases.rebuild_metadata import int32
from cases.segment_tables import stage_of
from hypothesis import given, settings
from triton.runtime import interpreter

from adsc_kernels import ops
from adsc_kernels.backend import backend
from adsc_kernels.triton import launch

X = torch.arange(10.0)
CU = int32([0, 10, 16], 3)


@pytest.fixture(autouse=True)
def checking(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "CHECK", True)
    # The launch says debug=True on a GPU; the interpreter takes it from here.
    options = dataclasses.replace(interpreter.interpreter_builder.options, debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    with backend("triton"):
        yield


LISTS = (None, torch.tensor([[[0, 3, 1, 2]]]), torch.tensor([0, 2, 4]), torch.tensor([0, 4, 8]))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, torch.tensor([[[3, 0, 1, 2]]]), "segments, keep_indices: rows that don.*t rise"),
        (1, torch.tensor([[[0, 4, 1, 2]]]), "segments, keep_indices: rows that don.*t rise"),
        (1, torch.tensor([[[0, 3, 1]]]), "keep_indices: fewer"),
        (2, torch.tensor([0, 5, 4]), "cu_kept: "),
        (3, torch.tensor([0, 1, 8]), "cu_kept: "),
        (4, torch.tensor([0, -1]), "prefix_lens: "),
        (5, torch.tensor([4, 7]), "seq_lens: less"),
        (5, torch.tensor([4, 3]), "seq_lens: less"),
        (6, torch.tensor([0, 3, 12]), "seq_lens: .*room"),
        (6, torch.tensor([0, 6, 13]), "seq_starts: "),
    ],
)
def test_lists_of_a_compaction(place: int, value: torch.Tensor, message: str) -> None:
    rows = [*LISTS, torch.tensor([0, 0]), torch.tensor([4, 5]), torch.tensor([0, 6, 12])]
    cache = torch.arange(12.0).reshape(12, 1, 1)
    before = cache.clone()
    wrong = list(rows)
    wrong[place] = value
    with pytest.raises(Exception, match=message):
        torch.ops.adsc_triton.compact_kv_([cache], 1, *wrong, "NHD")
    assert torch.equal(cache, before)
    torch.ops.adsc_triton.compact_kv_([cache], 1, *rows, "NHD")
    assert cache[:9].flatten().tolist() == [0, 3, 2, 3, 4, 5, 7, 8, 10]


@pytest.mark.parametrize("rows", [[0, 10], [-1], [1 << 40]])
def test_indices(rows: list[int]) -> None:
    with pytest.raises(Exception, match="keep_indices: a value outside"):
        ops.downsample(X, keep_indices=torch.tensor(rows))


@pytest.mark.parametrize(
    "table",
    [
        [[0, 6, 5, 5, 0, 0]],  # past the end
        [[0, -1, 5, 5, 0, 0]],  # before the first row
        [[0, 0, 8, 4, 0, 0]],  # four rows for five
    ],
)
def test_segments(table: list[list[int]]) -> None:
    stage = stage_of(table, 5, 10)
    with pytest.raises(Exception, match="segments: an output row without"):
        ops.downsample(X, stage)
    x = torch.zeros(10, 4)
    with pytest.raises(Exception, match="segments: an output row without"):
        ops.downsample_add_rms_norm(x, x, torch.ones(4), stage)


@pytest.mark.parametrize("pattern", [-1, 3, 7])
def test_patterns(pattern: int) -> None:
    with pytest.raises(Exception, match="segments: a pattern"):
        ops.downsample(X, stage_of([[0, 0, 5, 5, 0, pattern]], 5, 10))


@pytest.mark.parametrize(
    ("cu_seqlens", "spans", "message"),
    [
        (CU, [[2, 0, 1]], "spans: a sequence outside"),
        (CU, [[-1, 0, 1]], "spans: a sequence outside"),
        (CU, [[0, -1, 2]], "spans: a negative"),
        (CU, [[0, 3, -1]], "spans: a negative"),
        (CU, [[0, 0, 5], [0, 4, 2]], "spans: out of order"),
        (CU, [[1, 0, 1], [0, 0, 1]], "spans: out of order"),
        (CU, [[1, 3, 4]], "spans: out of order, or past"),
        (int32([0, 10, 9], 3), [[0, 0, 1]], "cu_seqlens: not rising"),
        (CU + 1, [[0, 0, 1]], "cu_seqlens: not rising"),
        (CU, [[0, 0, 4, 2, 3]], "spans: height x width"),
        (CU, [[0, 0, 8, 4, 2]], "spans: height x width, or a height above"),
    ],
)
def test_layouts(cu_seqlens: torch.Tensor, spans: list[list[int]], message: str) -> None:
    table = int32(spans, len(spans), len(spans[0]))
    arguments = ((1, 1), "grid", 3) if len(spans[0]) == 5 else ("1/2",)
    with pytest.raises(Exception, match=message):
        ops.rebuild_metadata(cu_seqlens, table, *arguments)


@settings(max_examples=30, deadline=None)
@given(drawn=blocks(outside=True))
def test_block_tables(drawn: Blocks) -> None:
    """Refused exactly where the CPU op refuses, with no byte written."""
    drawn.check_refused_alike(
        torch.ops.adsc_triton.compact_paged_kv_,
        lambda name: pytest.raises(Exception, match=f"{name}: a block"),
    )


def test_what_is_right_passes() -> None:
    stage = stage_of([[0, 0, 8, 4, 0, 2], [4, 8, 2, 2, 0, 0]], 6, 10)
    assert ops.downsample(X, stage).tolist() == [0, 2, 5, 7, 8, 9]
    assert ops.downsample(X, keep_indices=torch.tensor([9, 0])).tolist() == [9, 0]
    assert int(ops.rebuild_metadata(CU, int32([0, 1, 4], 1, 3), "1/2").num_tokens) == 14
    grids = int32([0, 0, 6, 2, 3], 1, 5)
    assert int(ops.rebuild_metadata(CU, grids, ("1/2", "1/3"), "grid", 2).num_tokens) == 11
