"""Which calls pass the dispatcher by: those in which it would do nothing of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import adsc_kernels as adsc
from adsc_kernels import ops

ROWS = torch.tensor([2, 0])
COMPLEX = torch.view_as_complex(torch.arange(24.0).reshape(3, 4, 2))


@pytest.fixture(autouse=True)
def in_triton() -> Iterator[None]:
    with adsc.backend("triton"):
        yield


class Seen(TorchDispatchMode):
    """The names of the ops that a mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Kind(torch.Tensor):
    """A tensor of a kind of its own."""


@pytest.mark.parametrize(
    "x", [COMPLEX.conj(), torch._neg_view(COMPLEX.real.clone())], ids=["conjugate", "negative"]
)
def test_what_stands_for_other_numbers(x: torch.Tensor) -> None:
    """A view whose numbers are not the bits in memory is read as what it stands for."""
    assert torch.equal(ops.downsample(x, keep_indices=ROWS), x[ROWS])
    assert torch.equal(ops.downsample_many([ROWS.new_ones(3), x], keep_indices=ROWS)[1], x[ROWS])


def test_modes_and_profiles_see_the_op() -> None:
    x, cache = torch.ones(3, 4), torch.ones(1, 3, 1, 4)
    rows = {"keep_indices": ROWS[1:], "cu_kept": [0, 1], "seq_lens": [3]}
    with Seen() as seen:
        ops.downsample(x, keep_indices=ROWS)
        ops.compact_kv_([cache], [cache.clone()], **rows)
    assert "adsc_triton::downsample" in seen.names
    assert "adsc_triton::compact_kv_" in seen.names
    with torch.profiler.profile() as profile:
        ops.downsample(x, keep_indices=ROWS)
    assert "adsc_triton::downsample" in [event.name for event in profile.events()]


def test_gradients_and_kinds_go_the_whole_way() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    ops.downsample(x, keep_indices=ROWS).sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [1, 0, 1]
    kind = torch.ones(3, 4).as_subclass(Kind)
    assert type(ops.downsample(kind, keep_indices=ROWS)) is Kind


def test_a_cache_that_is_written_is_seen_by_autograd() -> None:
    k, v = torch.ones(1, 3, 1, 4), torch.ones(1, 3, 1, 4)
    before = k._version
    ops.compact_kv_([k], [v], keep_indices=ROWS[1:], cu_kept=[0, 1], seq_lens=[3])
    assert k._version == before + 1


PLAN = adsc.make_plan(
    adsc.CompressionSchedule.parse("1:1/2", num_layers=2), [0, 9, 20], [(0, 2, 5), (1, 3, 8)]
)
HIDDEN = torch.randn(20, 8)


def layers() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    k, v = ([torch.randn(2, 12, 3, 4) for _ in range(3)] for _ in range(2))
    return k, v


def compact_like_new(run: Callable[[], object], *caches: torch.Tensor) -> None:
    """run moves in caches what a call that knows nothing of them would move."""
    wanted = [x.clone() for x in caches]
    with adsc.backend("auto"):
        ops.compact_kv_(wanted[:3], wanted[3:], PLAN.stages[1])
    run()
    assert all(map(torch.equal, wanted, caches))


CHANGES: dict[str, Callable[[list[torch.Tensor]], object]] = {
    "place": lambda v: setattr(v[1], "data", torch.randn(2, 12, 3, 4)),
    "strides": lambda v: setattr(v[1], "data", torch.randn(2, 3, 12, 4).transpose(1, 2)),
    "tensor": lambda v: v.__setitem__(1, torch.randn(2, 12, 3, 4)),
}


@pytest.mark.parametrize(
    ("change", "op"),
    [("place", "compact_kv_"), ("strides", "compress_step"), ("tensor", "compact_kv_")],
)
def test_what_changed_in_an_object_is_looked_at_anew(change: str, op: str) -> None:
    """The library keeps its tensors for Triton too, and launchers what they have worked out."""
    k, v = layers()
    cache = ops.DenseCache(k, v, stage=PLAN.stages[1])

    def run() -> object:
        if op == "compact_kv_":
            return ops.compact_kv_(cache)
        return ops.compress_step(HIDDEN, cache, PLAN.stages[1])

    for _ in range(3):
        compact_like_new(run, *k, *v)
    kept = cache._kept[0]  # type: ignore[index]
    assert kept is not None
    assert kept.listed.places.prepared
    CHANGES[change](v)
    for _ in range(2):
        compact_like_new(run, *k, *v)
    assert cache._kept[0] not in (None, kept)  # type: ignore[index]


@pytest.mark.parametrize("calls", [1, 2])
def test_what_is_wrong_in_an_object_is_refused(calls: int) -> None:
    for spoil, message in (
        (lambda v: v[1].resize_(2, 11, 3, 4), r"^v_caches\[1\]: expected 2 blocks of 12 tokens"),
        (lambda v: setattr(v[1], "data", v[2].data), r"^v_caches\[1\], v_caches\[2\]: .*share"),
        (lambda v: setattr(v[1], "data", v[1].int()), r"^v_caches\[1\]: expected torch.float32"),
        (lambda v: v[1].requires_grad_(), r"^v_caches\[1\]: .*no gradient"),
    ):
        k, v = layers()
        cache = ops.DenseCache(k, v, stage=PLAN.stages[1])
        for _ in range(calls):
            ops.compact_kv_(cache)
        spoil(v)
        before = [x.clone() for x in (*k, *v)]
        with pytest.raises((TypeError, ValueError), match=message):
            ops.compact_kv_(cache)
        assert all(map(torch.equal, before, (*k, *v)))
