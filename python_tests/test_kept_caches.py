"""What the native library keeps of a cache object from its second call on, and when it doesn't."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases.compact import Case, check_buffers, check_results, dense_cases, paged_cases
from cases.compress_step import cache_of
from cases.refused import BY_THE_OP
from cases.refused.compact import STAGE, TABLE
from hypothesis import given, settings
from torch import Tensor

from adsc_kernels import ops
from adsc_kernels.kv import kept, tensors

HIDDEN = torch.randn(STAGE.num_tokens_in, 8)


def caches(layers: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    return tuple([torch.randn(2, 16, 3, 4) for _ in range(layers)] for _ in range(2))  # type: ignore[return-value]


def pools(layers: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    return tuple([torch.randn(9, 4, 3, 4) for _ in range(layers)] for _ in range(2))  # type: ignore[return-value]


def kept_one(k: Any, v: Any, **options: Any) -> ops.DenseCache:
    """An object that was compacted twice."""
    cache = ops.DenseCache(k, v, stage=STAGE, **options)
    for _ in range(2):
        ops.compact_kv_(cache)
    assert cache._kept is not None
    assert isinstance(cache._kept[0], kept.KeptCaches)
    return cache


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers that were given, one each time that the library was handed tensors to keep."""
    numbers = []

    class Counted(kept.KeptCaches):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            numbers.append(self.number)

    monkeypatch.setattr(tensors, "KeptCaches", Counted)
    return numbers


@settings(max_examples=60, deadline=None)
@given(case=dense_cases() | paged_cases())
def test_every_call_does_the_same(case: Case) -> None:
    """Of an object the first call, the one that has the library keep its tensors, and the next."""
    built, wanted = case.build(), case.build()
    paged = "block_table" in case.extra
    op: Callable[..., Any] = ops.compact_paged_kv_ if paged else ops.compact_kv_
    before = {
        name: [x.clone() for x in built.arguments.get(name) or []] for name in tensors_of(built)
    }
    result = op(**wanted.arguments)
    cache = cache_of(case, built.arguments)
    for _ in range(3):
        for name, saved in before.items():
            for x, was in zip(built.arguments[name], saved, strict=True):
                x.copy_(was)
        check_results(op(cache), result)
        check_buffers(built, wanted)


def tensors_of(built: Any) -> list[str]:
    names = ("k_caches", "v_caches", "k_scales", "v_scales")
    return [name for name in names if built.arguments.get(name)]


def test_tensors_are_handed_over_once(made: list[int]) -> None:
    k, v = pools()
    for _ in range(3):
        ops.compact_paged_kv_(k, v, TABLE, STAGE)
    assert not made  # a call's own words are one call's
    cache = ops.PagedCache(k, v, TABLE)
    for _ in range(3):
        ops.compact_paged_kv_(cache, stage=STAGE)
        ops.compress_step(HIDDEN, cache, STAGE)
    for _ in range(3):
        ops.compact_paged_kv_(replace(cache, block_table=TABLE.long()), stage=STAGE)
    assert len(made) == 1
    rows: dict[str, Any] = {
        "seq_lens": [3, 3],
        "keep_indices": torch.tensor([0, 1]),
        "cu_kept": [0, 1, 2],
    }
    ops.compact_paged_kv_(replace(cache, layout="HND"), **rows)
    assert len(made) == 2


@pytest.mark.parametrize("form", [list, tuple])
def test_another_tensor_in_the_list_is_moved(form: type) -> None:
    k, v = caches()
    cache = kept_one(k, v)
    old, new = v[1], torch.randn(2, 16, 3, 4)
    before, wanted = old.clone(), new.clone()
    ops.compact_kv_(wanted, None, STAGE)
    v[1] = new
    ops.compact_kv_(cache if form is list else replace(cache, v_caches=tuple(v)))
    assert torch.equal(new, wanted)
    assert torch.equal(old, before)


def test_tensors_that_all_changed_alike_are_looked_at_anew() -> None:
    """The room of a sequence is what it is now."""
    k, v = caches()
    cache = kept_one(k, v)
    for x in (*k, *v):
        x.data = torch.randn(2, 20, 3, 4)
    wanted = [x.clone() for x in (*k, *v)]
    ops.compact_kv_(wanted[:3], wanted[3:], STAGE)
    ops.compact_kv_(cache)
    assert all(map(torch.equal, (*k, *v), wanted))
    for x in (*k, *v):
        x.resize_(2, 15, 3, 4)
    with pytest.raises(ValueError, match=r"^seq_lens: expected at most 15 rows"):
        ops.compact_kv_(cache)


def test_autograd_is_told_in_every_call() -> None:
    k, v = caches()
    cache = kept_one(k, v)
    versions = [x._version for x in (*k, *v)]
    ops.compact_kv_(cache)
    assert [x._version for x in (*k, *v)] == [n + 1 for n in versions]
    k[2].requires_grad_()
    with pytest.raises(ValueError, match=r"^k_caches\[2\]: .*no gradient"):
        ops.compact_kv_(cache)
    with torch.no_grad():
        ops.compact_kv_(cache)


def test_inference_tensors_are_written_in_inference_mode_alone() -> None:
    with torch.inference_mode():
        k, v = caches()
        cache = kept_one(k, v)
        ops.compact_kv_(cache)
    with pytest.raises(ValueError, match=r"^k_caches\[0\]: .*inference tensor"):
        ops.compact_kv_(cache)


def test_nothing_outlives_the_object() -> None:
    """Nor does a tensor that left the list outlive the next call."""
    k, v = caches()
    cache = kept_one(k, v)
    first = weakref.ref(k[0])
    k[0] = torch.randn(2, 16, 3, 4)
    ops.compact_kv_(cache)
    ops.compact_kv_(cache)
    gc.collect()
    assert first() is None
    others = [weakref.ref(x) for x in (*k, *v)]
    number = cache._kept[0].number  # type: ignore[index, union-attr]
    del cache, k, v
    gc.collect()
    assert not any(other() for other in others)
    with pytest.raises(
        BY_THE_OP, match=f"^caches: expected what keep_caches returned, got {number}"
    ):
        torch.ops.adsc_kernels.compact_kv_.kept(number, *ROWS)


ROWS = (STAGE.segments, None, STAGE.cu_seqlens, STAGE.cu_seqlens_in, None, None, None)


@pytest.mark.parametrize("made_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_keeps_nothing_of_the_object(made_of: Callable[[Any], Any]) -> None:
    k, v = caches()
    cache = kept_one(k, v)
    other = made_of(cache)
    before = [x.clone() for x in (*k, *v)]
    for _ in range(3):
        other.k_caches[0].normal_()
        wanted = other.k_caches[0].clone()
        ops.compact_kv_(wanted, None, STAGE)
        ops.compact_kv_(other)
        assert torch.equal(other.k_caches[0], wanted)
    assert all(map(torch.equal, before, (*k, *v)))


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "place": lambda x: setattr(x, "data", x.clone()),
    "shape": lambda x: x.resize_(2, 16, 3, 3),
    "strides": lambda x: x.transpose_(1, 2),
    "dtype": lambda x: setattr(x, "data", x.data.view(torch.int32)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_op_itself_refuses_what_changed(change: str) -> None:
    k, v = caches()
    number = torch.ops.adsc_kernels.keep_caches([*k, *v], 3, "NHD")
    op = torch.ops.adsc_kernels.compact_kv_.kept
    op(number, *ROWS)
    CHANGES[change](v[1])
    before = [x.clone() for x in (*k, *v)]
    with pytest.raises(BY_THE_OP, match=r"^caches\[4\]: expected a tensor that hasn't changed"):
        op(number, *ROWS)
    assert all(map(torch.equal, before, (*k, *v)))
    torch.ops.adsc_kernels.release_caches(number)


@pytest.mark.parametrize("change", CHANGES)
def test_other_kernels_are_told_of_what_changed(change: str) -> None:
    k, v = caches()
    cache = kept_one(k, v)._kept[0]  # type: ignore[index]
    assert cache is not None
    assert cache.unchanged()
    CHANGES[change](v[1])
    assert not cache.unchanged()


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_they_are_told_whatever_torch_makes_of_an_error(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.15 makes a RuntimeError of whatever a native op throws."""

    def refuses(number: int) -> None:
        raise error(f"caches: expected what keep_caches returned, got {number}")

    cache = kept_one(*caches())._kept[0]  # type: ignore[index]
    assert cache is not None
    known = kept._ops()._replace(check=refuses)
    monkeypatch.setattr(kept, "_ops", lambda: known)
    assert not cache.unchanged()
