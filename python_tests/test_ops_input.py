"""Values of the wrong kind, drawn, for every argument of the ops: the error names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adsc_kernels import CompressionSchedule, make_plan, ops
from adsc_kernels.ops import _dispatch

PLAN = make_plan(CompressionSchedule.parse("1:1/2", num_layers=2), [0, 12], [(0, 1, 8)])
STAGE = PLAN.stages[1]
X, WEIGHT = torch.zeros(12, 4), torch.zeros(4)
K = torch.zeros(12, 1, 4)
TABLE = torch.arange(4, dtype=torch.int32).view(1, 4)
BOUNDS, SPANS = (torch.tensor(v, dtype=torch.int32) for v in ([0, 12], [[0, 1, 8]]))
QUANTIZED = torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)

NO_TENSORS: list[Any] = [PLAN, "x", 3, QUANTIZED, X.to_sparse(), [None]]
NO_LENGTHS: list[Any] = [[2**31], [2**70], [True], [12.0], "12", 12, [-1], {12}, TABLE]
NO_INTS: list[Any] = [True, 2.0, "3", -1, 2**63, 2**70]
ARGUMENTS: dict[str, tuple[list[Any], Callable[[Any], Any]]] = {
    "x": (NO_TENSORS, lambda v: ops.downsample(v, STAGE)),
    "xs": ([*NO_TENSORS, X], lambda v: ops.downsample_many(v, STAGE)),
    "stage": ([PLAN, 1, "s"], lambda v: ops.downsample(X, v)),
    "stage of a cache": ([PLAN, 1, "s"], lambda v: ops.compact_kv_(K, None, v)),
    "weight": (NO_TENSORS, lambda v: ops.downsample_add_rms_norm(X, X, v, STAGE)),
    "eps": (
        ["1e-5", None, True, float("nan"), float("inf"), 10**400, 1j, -1],
        lambda v: ops.boundary_step(X, STAGE, eps=v),
    ),
    "others": ([*NO_TENSORS, X], lambda v: ops.boundary_step(X, STAGE, others=v)),
    "layout.num_tokens": (
        NO_INTS,
        lambda v: ops.boundary_step(
            X, layout=ops.BatchLayout(BOUNDS, SPANS, "1/2", num_tokens=v)
        ),
    ),
    "keep": ([True, 0.5, "x", (1.5, 2), (True, 2), None], lambda v: ops.rebuild_metadata(
        BOUNDS, SPANS, v)),
    "pattern": ([3, None, "other", ["start"]], lambda v: ops.rebuild_metadata(
        BOUNDS, SPANS, "1/2", v)),
    "k_caches": (NO_TENSORS, lambda v: ops.compact_kv_(v, None, STAGE)),
    "seq_lens": (NO_LENGTHS, lambda v: ops.compact_kv_(K, None, STAGE, seq_lens=v)),
    "prefix_lens": (NO_LENGTHS, lambda v: ops.compact_kv_(
        K, None, STAGE, prefix_lens=v, seq_lens=[12])),
    "block_size": ([*NO_INTS, 0], lambda v: ops.compact_paged_kv_(K, None, TABLE, STAGE, v)),
    "edit_table": ([1, "no"], lambda v: ops.compact_paged_kv_(
        K, None, TABLE, STAGE, 3, edit_table=v)),
}  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(ARGUMENTS)))
def test_the_error_names_the_argument(data: st.DataObject, name: str) -> None:
    values, call = ARGUMENTS[name]
    value = values[data.draw(st.integers(0, len(values) - 1))]
    named = name.removesuffix(" of a cache")
    with pytest.raises((TypeError, ValueError), match=rf"^{named}.*: expected .*got"):
        call(value)


@pytest.mark.parametrize("grad", [False, True])
def test_a_refusal_is_a_value_error_where_torch_forgets_that(
    grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.15 makes a RuntimeError of whatever a native op throws."""

    def refuses(*_: Any) -> None:
        raise RuntimeError(words)

    monkeypatch.setitem(_dispatch._native, "downsample", (refuses, refuses))
    calls = [
        lambda: ops.downsample(torch.zeros(12, 4, requires_grad=grad), STAGE),
        lambda: _dispatch.call(refuses, X, grad=grad),
        lambda: _dispatch.call_in_place(refuses, [X], written=[X], places=None),
    ]
    for words, error in (("x: expected rows, got none", ValueError), ("no room", RuntimeError)):
        for call in calls:
            with pytest.raises(error, match=f"^{words}$") as caught:
                call()
            assert caught.type is error
