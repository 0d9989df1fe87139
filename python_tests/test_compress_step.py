"""compress_step against the ops that it joins and against the reference."""
# ruff: noqa: E501 (tables of cases, one a line)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases.boundary_step import Rows, boundaries, same_step
from cases.compact import Case, check_buffers, check_results
from cases.compress_step import HIDDEN, PLAN, TABLE, WEIGHT, S, caches, check, sample, step
from cases.refused import BY_THE_OP
from cases.refused.boundary_step import BAD_CALLS as BAD_BOUNDARIES
from cases.refused.boundary_step import LAYOUT
from cases.refused.compact import BAD_CALLS as BAD_CACHES
from cases.run import on
from cases.segment_tables import FakeStage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from adsc_kernels import UnsupportedError, ops


@settings(max_examples=150, deadline=None)
@given(case=caches, rows=boundaries(), uploaded=st.booleans())
def test_equals_the_ops_it_joins(case: Case, rows: Rows, uploaded: bool) -> None:
    built, wanted = case.build(), case.build()
    done = step(case, built, rows, on("cpu"), uploaded)
    op = ops.compact_paged_kv_ if "block_table" in case.extra else ops.compact_kv_
    check_results(done.compaction, op(**wanted.arguments))
    check_buffers(built, wanted)
    same_step(done.boundary, ops.boundary_step(**rows.arguments), close=None)


@settings(max_examples=60, deadline=None)
@given(case=caches, rows=boundaries(max_length=12), uploaded=st.booleans())
def test_equals_the_reference(case: Case, rows: Rows, uploaded: bool) -> None:
    check(case, rows, on("cpu"), uploaded=uploaded)


ROWS = [len(stage.token_indices()) for stage in PLAN.stages]


def test_of_a_plan() -> None:
    """At boundary 2: rows of stage 1 go to stage 2, and so do the caches of stage 0 and stage 1."""
    hidden = torch.randn(ROWS[1], 8)
    for earlier in (0, 1):
        way = PLAN.between(earlier, 2)
        k = torch.randn(ROWS[earlier], 2, 4)
        before = k.clone()
        cache = ops.DenseCache(k, None, None if earlier == 1 else way)
        step = ops.compress_step(hidden, cache, PLAN.stages[2])
        starts = way.cu_seqlens_in.tolist()
        sources = torch.from_numpy(way.source_rows()).split(list(way.seq_lens))
        for b, rows in enumerate(sources):
            assert torch.equal(k[starts[b] : starts[b] + len(rows)], before[rows])
        assert step.compaction.seq_lens.host == PLAN.stages[2].seq_lens
        assert torch.equal(step.boundary.hidden, ops.downsample(hidden, PLAN.stages[2]))


def test_more_tensors_than_one_launch_takes() -> None:
    hidden = torch.randn(ROWS[0], 8)
    others = [torch.arange(ROWS[0]) + i for i in range(20)]
    caches = [torch.randn(ROWS[0], 1, 2) for _ in range(40)]
    wanted = [cache.clone() for cache in caches]
    ops.compact_kv_(wanted, None, PLAN.stages[1])
    cache = ops.DenseCache(caches, None)
    step = ops.compress_step(hidden, cache, PLAN.stages[1], others=others)
    assert all(map(torch.equal, caches, wanted))
    assert all(map(torch.equal, step.boundary.others, ops.downsample_many(others, PLAN.stages[1])))


# ---- Bad input ----


def own_cache(**options: Any) -> ops.DenseCache:
    return ops.DenseCache(torch.randn(ROWS[0], 2, 4), None, **{"stage": PLAN.stages[1], **options})


@pytest.mark.parametrize("name", BAD_BOUNDARIES)
def test_bad_boundaries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What boundary_step refuses, with its words; and the caches stay as they are."""
    bad_call, error, message = BAD_BOUNDARIES[name]
    cache = own_cache()
    before = cache.k_caches.clone()

    def step(hidden: Any, stage: Any = None, **options: Any) -> object:
        return ops.compress_step(hidden, cache, stage, **options)

    monkeypatch.setattr(ops, "boundary_step", step)
    if name in ("hidden device", "cu_seqlens device"):
        error, message = ValueError, "device"
    with pytest.raises(error, match=message):
        bad_call()
    assert torch.equal(cache.k_caches, before)


@pytest.mark.parametrize("name", BAD_CACHES)
def test_bad_caches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compaction ops refuse, with their words."""
    bad_call, error, message = BAD_CACHES[name]
    # Without rows of its own a cache takes the boundary's, which is another fault.
    no_rows = {"neither": (ValueError, "^cache: .*neither")}
    error, message = no_rows.get(name, (error, message))

    def step(**arguments: Any) -> object:
        kind = ops.PagedCache if "block_table" in arguments else ops.DenseCache
        rows = torch.arange(len(HIDDEN))
        return ops.compress_step(HIDDEN, kind(**arguments), keep_indices=rows)

    monkeypatch.setattr(ops, "compact_kv_", step)
    monkeypatch.setattr(ops, "compact_paged_kv_", step)
    with pytest.raises(error, match=message):
        bad_call()


FAKE = FakeStage(PLAN.stages[1].segments, PLAN.stages[1].num_tokens, ROWS[0])
SHARED = torch.randn(ROWS[0], 3, 8)
FORMS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "a list of caches": (lambda: ops.compress_step(HIDDEN, [HIDDEN], PLAN.stages[1]), TypeError, "^cache: .*list"),  # type: ignore[arg-type]
    "no stage": (lambda: ops.compress_step(HIDDEN, own_cache()), ValueError, "^stage, keep_indices: .*neither"),
    "indices for both": (lambda: ops.compress_step(HIDDEN, own_cache(stage=None), keep_indices=torch.arange(3)), ValueError, "^cache: .*neither"),
    "layout for both": (lambda: ops.compress_step(torch.zeros(7, 2), own_cache(stage=None), layout=LAYOUT), UnsupportedError, "^layout: .*cache"),
    "not a plan's": (lambda: ops.compress_step(HIDDEN, own_cache(stage=None), FAKE), TypeError, "^stage: .*StagePlan.*FakeStage"),
    "device": (lambda: ops.compress_step(HIDDEN.to("meta"), own_cache(), keep_indices=torch.arange(3, device="meta")), ValueError, "device of hidden, meta, got cpu"),
    "a gradient": (lambda: ops.compress_step(HIDDEN.clone().requires_grad_(), own_cache(), PLAN.stages[1]), ValueError, "^hidden: .*no gradient"),
    "a gradient of others": (lambda: ops.compress_step(HIDDEN, own_cache(), PLAN.stages[1], others=[HIDDEN, HIDDEN.clone().requires_grad_()]), ValueError, r"^others\[1\]: .*no gradient"),
    "hidden in the cache": (lambda: ops.compress_step(SHARED[:, 1], ops.DenseCache(SHARED[:, 1:], None), PLAN.stages[1]), ValueError, r"^k_caches\[0\], hidden: .*memory|^hidden, k_caches\[0\]: .*memory"),
    "others in the cache": (lambda: ops.compress_step(HIDDEN, ops.DenseCache(SHARED.view(torch.uint8), None), PLAN.stages[1], others=[SHARED[:, 2, 7:]]), ValueError, r"^k_caches\[0\], others\[0\]: .*memory"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_what_only_the_two_together_refuse(name: str) -> None:
    bad_call, error, message = FORMS[name]
    before = SHARED.clone()
    with pytest.raises(error, match=message):
        bad_call()
    assert torch.equal(SHARED, before)


def test_views_beside_the_cache_are_no_overlap() -> None:
    shared = SHARED.clone()
    before = shared[:, 0].clone()
    step = ops.compress_step(shared[:, 0], ops.DenseCache(shared[:, 1:], None), PLAN.stages[1])
    assert torch.equal(step.boundary.hidden, ops.downsample(before, PLAN.stages[1]))
    with torch.no_grad():
        ops.compress_step(HIDDEN.clone().requires_grad_(), own_cache(), PLAN.stages[1])


# ---- The op ----

OP = torch.ops.adsc_kernels.compress_step.default


@pytest.mark.parametrize("kind", ["dense", "paged", "layout"])
def test_opcheck(kind: str) -> None:
    opcheck(OP, sample(kind))


def test_the_op_itself_checks_too() -> None:
    for kind, place, value, message in [
        ("dense", 4, [HIDDEN[1:]], "^others: .*22, got 21"),
        ("dense", 13, [], "^caches: expected at least one"),
        ("paged", 15, TABLE + 25, "^block_table: expected"),
        ("paged", 23, S.cu_seqlens_in, "^block_table, seq_starts: .*both"),
        ("dense", 24, True, "^edit_table: "),
        ("dense", 25, torch.tensor([0]), "^read_only_blocks: "),
        ("paged", 25, TABLE[0, :9], "^read_only_blocks: .*no move into block"),
        ("dense", 27, [], "^outs: expected 2 tensors, got 0"),
        ("dense", 27, [HIDDEN[: S.num_tokens], HIDDEN], r"^outs\[1\]: .*\[22, 8\]"),
        ("layout", 12, 5, r"^outs\[0\]: "),
    ]:
        arguments = list(sample(kind))
        arguments[place] = value
        saved = [x.clone() for x in arguments[13]]
        with pytest.raises(BY_THE_OP, match=message):
            OP(*arguments)
        assert all(map(torch.equal, saved, arguments[13]))


def test_fullgraph() -> None:
    """Caches that a graph mutates, beside work of its own on the rows."""

    def step(hidden: Tensor, both: Tensor, stage: Any) -> tuple[Tensor, ...]:
        cache = ops.DenseCache(both[:, 0], both[:, 1])
        done = ops.compress_step(
            hidden * 2, cache, stage, residual=hidden, weight=WEIGHT, others=[hidden]
        )
        lens = done.compaction.seq_lens.device
        return done.boundary.hidden + 1, *done.boundary.others, lens, both.sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    hidden, both = torch.randn(ROWS[0], 8), torch.randn(ROWS[0], 2, 3, 4)
    other = both.clone()
    wanted = step(hidden, both, S)
    got = compiled(hidden, other, S)
    assert torch.equal(both, other)
    assert all(map(torch.equal, got, wanted))


def test_fullgraph_paged() -> None:
    def step(hidden: Tensor, pool: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        cache = ops.PagedCache(pool, None, table, edit_table=True)
        done = ops.compress_step(hidden, cache, S)
        assert done.compaction.block_table is not None
        return done.boundary.hidden, done.compaction.block_table, done.compaction.slot_mapping

    torch._dynamo.reset()
    hidden, pool = torch.randn(ROWS[0], 8), torch.randn(30, 4, 2, 3)
    other = pool.clone()
    wanted = step(hidden, pool, TABLE)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, other, TABLE)
    assert torch.equal(pool, other)
    assert all(map(torch.equal, got, wanted))
