"""One graph of a compaction for all batches; meta and fake tensors go through every public op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from adsc_kernels import CompressionSchedule, StagePlan, make_plan, ops

SCHEDULE = CompressionSchedule.parse("1:1/2", num_layers=2)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def stage_of(batch: int, text: int, device: str = "cpu") -> StagePlan:
    length = text + 8
    spans = [(b, 1, 8) for b in range(batch)]
    bounds = [b * length for b in range(batch + 1)]
    return make_plan(SCHEDULE, bounds, spans, device=device).stages[1]


def dense(k: Tensor, stage: StagePlan, lens: ops.Ints) -> Tensor:
    return ops.compact_kv_(k, None, stage, seq_lens=lens).seq_lens.device


def dense_by_index(k: Tensor, stage: StagePlan, lens: ops.Ints) -> Tensor:
    starts = ops.Ints((), stage.cu_seqlens_in)
    kept = ops.Ints((), stage.cu_seqlens)
    keep = k.new_zeros(stage.num_tokens, dtype=torch.int64)
    keep = ops.downsample(torch.arange(len(k)), stage) % lens.device[0] + keep
    return ops.compact_kv_(
        k, None, seq_starts=starts, keep_indices=keep, cu_kept=kept, seq_lens=lens
    ).slot_mapping


def paged(k: Tensor, stage: StagePlan, lens: ops.Ints) -> Tensor:
    pool = k.view(-1, 2, 2, 4)
    pages = stage.num_tokens_in // (stage.cu_seqlens.shape[0] - 1) // 2
    table = torch.arange(pool.shape[0], dtype=torch.int32).view(-1, pages)
    done = ops.compact_paged_kv_(pool, None, table, stage, edit_table=True, seq_lens=lens)
    assert done.block_table is not None
    return done.block_table


def joined(k: Tensor, stage: StagePlan, lens: ops.Ints) -> Tensor:
    return ops.compress_step(k[:, 0] + 1, ops.DenseCache(k, None, seq_lens=lens), stage)[0].hidden


@pytest.mark.parametrize("op", [dense, dense_by_index, paged, joined])
def test_two_graphs_for_forty_batches(op: Callable[..., Tensor]) -> None:
    graphs = 0

    def count(module: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return module

    compiled = torch.compile(op, fullgraph=True, backend=count)
    for batch in range(2, 42):
        stage = stage_of(batch, 2 * (batch % 5) + 2)
        k = torch.randn(stage.num_tokens_in, 2, 4)
        other = k.clone()
        # Graphs look at no lengths; eager calls do.
        lens = ops.Ints(stage.seq_lens_in, torch.tensor(stage.seq_lens_in, dtype=torch.int32))
        got = compiled(k, stage, lens)
        if op is not dense_by_index:
            assert torch.equal(got, op(other, stage, lens))
            assert torch.equal(k, other)
    assert graphs <= 2


def test_a_cache_that_is_too_small_is_an_error_in_the_graph_too() -> None:
    stage = stage_of(2, 4)
    compiled = torch.compile(dense, fullgraph=True, backend="eager")
    lens = torch.tensor([30, 30], dtype=torch.int32)
    with pytest.raises((RuntimeError, ValueError), match=r"seq_lens|rows"):
        compiled(torch.zeros(stage.num_tokens_in, 2, 4), stage, ops.Ints((30, 30), lens))


def calls(device: str, stage: StagePlan, heads: int) -> dict[str, Callable[[], Any]]:
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    rows = stage.num_tokens_in
    batch = len(stage.seq_lens)
    x, weight = zeros(rows, 4), zeros(4)
    k = [zeros(rows, heads, 4) for _ in range(3)]
    pages = max(stage.seq_lens_in) // 2 + 1
    pool = zeros(batch * pages, 2, heads, 4)
    table = zeros(batch, pages, dtype=torch.int32)
    bounds, spans = zeros(batch + 1, dtype=torch.int32), zeros(batch, 3, dtype=torch.int32)
    layout = ops.BatchLayout(bounds, spans, "1/2", num_tokens=rows)
    return {
        "downsample": lambda: [ops.downsample(x, stage)],
        "downsample_many": lambda: ops.downsample_many([x, x], stage),
        "downsample_add_rms_norm": lambda: ops.downsample_add_rms_norm(x, x, weight, stage),
        "boundary_step": lambda: ops.boundary_step(x, stage, residual=x, weight=weight)[:2],
        "a layout": lambda: ops.boundary_step(x, layout=layout).metadata,
        "rebuild_metadata": lambda: ops.rebuild_metadata(bounds, spans, "1/2"),
        "compact_kv_": lambda: [ops.compact_kv_(k[:1], k[1:2], stage).seq_lens.device],
        "compact_paged_kv_": lambda: [
            ops.compact_paged_kv_(pool, None, table, stage, edit_table=True).block_table
        ],
        "compress_step": lambda: [
            ops.compress_step(x, ops.DenseCache(k[0], k[1]), stage).boundary.hidden
        ],
    }  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    form=st.sampled_from(["meta", "fake"]),
    op=st.sampled_from(sorted(calls("meta", stage_of(1, 2, "meta"), 1))),
    batch=st.integers(1, 4),
    text=st.integers(1, 9),
    heads=st.integers(1, 3),
)
def test_shapes_without_values(form: str, op: str, batch: int, text: int, heads: int) -> None:
    if form == "meta":
        results = calls("meta", stage_of(batch, text, "meta"), heads)[op]()
    else:
        with FakeTensorMode():
            results = calls("cpu", stage_of(batch, text), heads)[op]()
    assert all(x.device.type == ("meta" if form == "meta" else "cpu") for x in results)
    if "layout" not in op and op not in ("rebuild_metadata", "compact_paged_kv_"):
        expected = batch if op == "compact_kv_" else stage_of(batch, text).num_tokens
        assert {x.shape[0] for x in results} == {expected}
