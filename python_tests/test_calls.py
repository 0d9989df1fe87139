"""What a call costs the host, counted: the library's own functions in Python, and those in C that
they call.

A count is the same on every machine, however busy. The bounds lie close above what was counted, so
that what creeps into a call is seen; bench/test_calls.py takes times.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import adsc_kernels as adsc
from adsc_kernels import ops

PACKAGE = os.path.dirname(adsc.__file__) + os.sep
PLAN = adsc.make_plan(
    adsc.CompressionSchedule.parse("1:1/4", num_layers=2), [0, 12, 24], [(0, 2, 8), (1, 2, 8)]
)
STAGE = PLAN.stages[1]
ROWS = STAGE.keep_indices()
HIDDEN, RESIDUAL = torch.randn(2, 24, 8).unbind()
WEIGHT = torch.ones(8)
OTHERS = [torch.arange(24), HIDDEN[:, :4].clone(), HIDDEN[:, 4:].clone()]
BOUNDS = torch.tensor([0, 12, 24], dtype=torch.int32)
SPANS = torch.tensor([[0, 2, 8], [1, 2, 8]], dtype=torch.int32)
TABLE = torch.arange(6, dtype=torch.int32).reshape(2, 3)
LAYOUT = ops.BatchLayout(BOUNDS, SPANS, "1/4", num_tokens=12)


def caches(count: int, *shape: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [torch.zeros(shape) for _ in range(count)], [torch.zeros(shape) for _ in range(count)]


def step(layers: int) -> Callable[[], object]:
    k, v = caches(layers, 2, 12, 1, 8)
    cache = ops.DenseCache(k, v)
    return lambda: ops.compress_step(
        HIDDEN, cache, STAGE, residual=RESIDUAL, weight=WEIGHT, others=OTHERS
    )


def compact(layers: int) -> Callable[[], object]:
    k, v = caches(layers, 2, 12, 1, 8)
    return lambda: ops.compact_kv_(k, v, STAGE)


def compact_object(layers: int) -> Callable[[], object]:
    cache = ops.DenseCache(*caches(layers, 2, 12, 1, 8))
    return lambda: ops.compact_kv_(cache, stage=STAGE)


def compact_paged(layers: int) -> Callable[[], object]:
    k, v = caches(layers, 6, 4, 1, 8)
    return lambda: ops.compact_paged_kv_(k, v, TABLE, STAGE)


def compact_paged_object(layers: int) -> Callable[[], object]:
    cache = ops.PagedCache(*caches(layers, 6, 4, 1, 8), TABLE)
    return lambda: ops.compact_paged_kv_(cache, stage=STAGE)


def counted(run: Callable[[], object]) -> Counter[str]:
    """What the third call of `run` calls: "call", in Python, and "c_call"."""
    run()
    run()
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(PACKAGE):
            calls[event] += 1

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


# run, and at most so many calls of functions in Python and in C
CALLS: dict[str, tuple[Callable[[], object], int, int]] = {
    "downsample": (lambda: ops.downsample(HIDDEN, STAGE), 5, 4),
    "downsample, keep_indices": (lambda: ops.downsample(HIDDEN, keep_indices=ROWS), 5, 4),
    "downsample_many": (lambda: ops.downsample_many([HIDDEN, RESIDUAL, *OTHERS], STAGE), 7, 4),
    "downsample_add_rms_norm": (
        lambda: ops.downsample_add_rms_norm(HIDDEN, RESIDUAL, WEIGHT, STAGE), 6, 4
    ),
    "rebuild_metadata": (lambda: ops.rebuild_metadata(BOUNDS, SPANS, "1/4"), 4, 4),
    "boundary_step": (
        lambda: ops.boundary_step(HIDDEN, STAGE, residual=RESIDUAL, weight=WEIGHT, others=OTHERS),
        9, 6,
    ),
    "boundary_step, layout": (
        lambda: ops.boundary_step(
            HIDDEN, layout=LAYOUT, residual=RESIDUAL, weight=WEIGHT, others=OTHERS
        ),
        8, 6,
    ),
    "compact_kv_": (compact(32), 17, 24),
    "compact_paged_kv_": (compact_paged(32), 28, 36),
    "compact_kv_, an object": (compact_object(32), 18, 25),
    "compact_paged_kv_, an object": (compact_paged_object(32), 29, 37),
    "compress_step": (step(8), 23, 23),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    run, python, c = CALLS[name]
    calls = counted(run)
    assert calls["call"] <= python
    assert calls["c_call"] <= c


@pytest.mark.parametrize("op", [compact, compact_object, compact_paged, compact_paged_object, step])
def test_no_function_is_called_for_each_layer(op: Callable[[int], Callable[[], object]]) -> None:
    """Python runs nothing of its own for a tensor of a cache; 8 layers or 64 are one call."""
    assert counted(op(8))["call"] == counted(op(64))["call"]


def moved(k: list[torch.Tensor], v: list[torch.Tensor]) -> None:
    k[1].set_(v[2].untyped_storage(), 0, v[2].shape, v[2].stride())


def changed_dtype(k: list[torch.Tensor], v: list[torch.Tensor]) -> None:
    v[1] = v[1].to(torch.int32)


def changed_rank(k: list[torch.Tensor], v: list[torch.Tensor]) -> None:
    v[1] = v[1][:, :, 0]


CHANGES: dict[str, tuple[Callable[[list[torch.Tensor], list[torch.Tensor]], object], str]] = {
    "resized": (lambda k, v: v[1].resize_(1, 12, 1, 8), r"^v_caches\[1\]: "),
    "set_": (moved, r"^k_caches\[1\], v_caches\[2\]: .*share memory"),
    "strides": (lambda k, v: k[1].transpose_(1, 3), r"^k_caches\[1\]: "),
    "rank": (changed_rank, r"^v_caches\[1\]: expected 4 dimensions"),
    "dtype": (changed_dtype, r"^v_caches\[1\]: expected torch.float32"),
    "removed": (lambda k, v: v.pop(), "^v_caches: expected 4 tensors"),
    "a gradient": (lambda k, v: k[3].requires_grad_(), r"^k_caches\[3\]: .*no gradient"),
}  # fmt: skip


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("op", ["compact_kv_", "compress_step"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_since_the_last_call_is_refused(name: str, op: str, calls: int) -> None:
    """Also where the library keeps an object's tensors, from its second call on."""
    change, message = CHANGES[name]
    k, v = caches(4, 2, 12, 1, 8)
    cache = ops.DenseCache(k, v, stage=STAGE)

    def run() -> object:
        if op == "compact_kv_":
            return ops.compact_kv_(cache)
        return ops.compress_step(HIDDEN, cache, STAGE)

    for _ in range(calls):
        run()
    change(k, v)
    before = [x.clone() for x in (*k, *v)]
    with pytest.raises((TypeError, ValueError), match=message):
        run()
    assert all(map(torch.equal, before, (*k, *v)))


def test_a_layout_that_changed_is_refused() -> None:
    """Its fields are looked at once, its tensors in each call."""
    bounds, spans = BOUNDS.clone(), SPANS.clone()
    layout = ops.BatchLayout(bounds, spans, "1/4", num_tokens=24)

    def run() -> list[int]:
        metadata = ops.boundary_step(HIDDEN, layout=layout).metadata
        assert metadata is not None
        return metadata.seq_lens.tolist()

    assert run() == [6, 6]
    spans[0, 2] = 4
    assert run() == [9, 6]
    spans[0, 2] = 40
    with pytest.raises(ValueError, match="spans: "):
        run()
    spans.copy_(SPANS)
    for change, undo, message in (
        (lambda: bounds.resize_(3, 1), lambda: bounds.resize_(3), r"cu_seqlens: expected shape"),
        (lambda: spans.resize_(2, 2), lambda: spans.resize_(2, 3), r"spans: expected shape"),
        (lambda: bounds.add_(1), lambda: bounds.sub_(1), "cu_seqlens: "),
    ):
        change()
        with pytest.raises(ValueError, match=message):
            run()
        undo()
    run()


@pytest.mark.parametrize("bad", [{"num_tokens": True}, {"keep": "5/4"}, {"max_height": 3}])
def test_a_layout_with_a_bad_field_is_refused_in_every_call(bad: dict[str, Any]) -> None:
    fields: dict[str, Any] = dict(cu_seqlens=BOUNDS, spans=SPANS, keep="1/4", num_tokens=12)
    layout = ops.BatchLayout(**(fields | bad))
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=next(iter(bad))):
            ops.boundary_step(HIDDEN, layout=layout)


def test_a_list_in_a_layout_may_change() -> None:
    """A grid's keep may be a list, which isn't looked at once for all."""
    spans = torch.tensor([[0, 2, 8, 2, 4]], dtype=torch.int32)
    keep = ["1/2", "1/2"]
    layout = ops.BatchLayout(BOUNDS, spans, keep, "grid", 2, num_tokens=24)  # type: ignore[arg-type]
    for share, rows in (("1/2", 18), ("1", 20)):
        keep[0] = share
        metadata = ops.boundary_step(HIDDEN, layout=layout).metadata
        assert metadata is not None
        assert metadata.num_tokens.item() == rows


def test_a_stage_that_changed_is_refused() -> None:
    plan = adsc.make_plan(
        adsc.CompressionSchedule.parse("1:1/4", num_layers=2), [0, 12, 24], [(0, 2, 8), (1, 2, 8)]
    )
    stage, x, (k, v) = plan.stages[1], HIDDEN.clone(), caches(2, 2, 12, 1, 8)
    calls: list[Callable[[], object]] = [
        lambda: ops.downsample(x, stage),
        lambda: ops.downsample_many([x], stage),
        lambda: ops.boundary_step(x, stage),
        lambda: ops.compact_kv_(k, v, stage),
    ]
    for run in calls:
        run()
    stage.segments.resize_(0, 6)
    for run in calls:
        with pytest.raises(ValueError, match="segments: expected a table for 12 "):
            run()
    x.resize_(20, 8)
    for run in calls[:3]:
        with pytest.raises(ValueError, match="expected 24 rows"):
            run()


def test_a_mode_sees_the_ops() -> None:
    """Native ops are called past what looks for `__torch_function__`, but not under such a mode."""
    seen = []

    class Listener(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, _: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    wanted = ops.downsample(HIDDEN, STAGE)
    with Listener():
        got = ops.downsample(HIDDEN, STAGE)
        ops.compact_kv_(*caches(2, 2, 12, 1, 8), STAGE)
    assert torch.equal(got, wanted)
    for name in ("downsample", "compact_kv_"):
        assert any(f"adsc_kernels.{name}" in function for function in seen)
