"""Whether the tensors of a cache share memory: exact, against all addresses one by one."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adsc_kernels as adsc
from adsc_kernels import ops
from adsc_kernels._planner import _C
from adsc_kernels.kv.overlap import check_apart, check_overlap
from adsc_kernels.kv.tensors import Caches, Places

POOL = torch.zeros(4096, dtype=torch.int8)


def addresses(x: Tensor) -> list[int]:
    begin = x.data_ptr() - POOL.data_ptr()
    places = product(*(range(size) for size in x.shape))
    starts = [
        begin + x.itemsize * sum(i * s for i, s in zip(place, x.stride(), strict=True))
        for place in places
    ]
    return [start + byte for start in starts for byte in range(x.itemsize)]


def names(tensors: list[Tensor]) -> list[str]:
    return [f"k[{i}]" for i in range(len(tensors))]


@st.composite
def views(draw: st.DrawFn) -> list[Tensor]:
    """Views that a pool interleaves, page by page and token by token, and some that miss it."""
    dtype = draw(st.sampled_from([torch.int8, torch.int16, torch.int32]))
    pool = POOL.view(dtype)
    row = draw(st.integers(1, 3))
    per_token = draw(st.integers(1, 3))
    token = row * per_token + draw(st.integers(0, 2))
    tokens = draw(st.integers(1, 3))
    per_page = draw(st.integers(1, 3))
    page = tokens * token * per_page + draw(st.integers(0, 3))
    tensors = []
    for _ in range(draw(st.integers(1, 5))):
        first = draw(st.integers(0, 2))
        place = (
            first * page
            + draw(st.integers(0, per_page - 1)) * tokens * token
            + draw(st.integers(0, per_token - 1)) * row
            + draw(st.sampled_from([0, 0, 0, 0, 1, 2]))
        )
        blocks, wide = draw(st.integers(1, 3)), draw(st.integers(1, row))
        step = page * draw(st.sampled_from([1, 1, 1, 2]))
        sizes = (blocks, draw(st.integers(1, tokens)), wide)
        tensors.append(pool.as_strided(sizes, (step, token, 1), place))
    return tensors


@settings(max_examples=300, deadline=None)
@given(tensors=views())
def test_exact(tensors: list[Tensor]) -> None:
    own = [addresses(x) for x in tensors]
    alone = all(len(set(a)) == len(a) for a in own)
    apart = alone and all(set(a).isdisjoint(b) for a, b in combinations(own, 2))
    if apart:
        return check_overlap(tensors, names(tensors))
    with pytest.raises(ValueError, match="share memory"):
        check_overlap(tensors, names(tensors))


@settings(max_examples=200, deadline=None)
@given(tensors=views(), inputs=views())
def test_inputs_beside_caches(tensors: list[Tensor], inputs: list[Tensor]) -> None:
    """A step's rows lie in other ways than its caches: what meets is always seen."""
    cache, given_names = tensors[0], [(f"x[{i}]", x) for i, x in enumerate(inputs)]
    own = set(addresses(cache))
    caches = Caches([cache], 1, (1,), False, 1, 1, ("k",), places=Places([cache.data_ptr()]))
    meet = [i for i, x in enumerate(inputs) if not own.isdisjoint(addresses(x))]
    if meet:
        with pytest.raises(ValueError, match="share memory"):
            check_apart(given_names, caches)
    beyond = [(name, x) for name, x in given_names if min(addresses(x)) > max(own)]
    check_apart(beyond, caches)


@pytest.mark.parametrize("order", ["pages", "tokens"])
def test_a_pool_of_many_layers_takes_a_sort(order: str) -> None:
    """No two of 252 views are compared, however they interleave."""
    shape = (3, 252, 4, 2) if order == "pages" else (3, 4, 252, 2)
    tensors = torch.zeros(shape).unbind(1 if order == "pages" else 2)
    places = [(x.data_ptr(), x.itemsize, x.shape, x.stride()) for x in tensors]
    assert _C.find_overlap(places) == (None, 0)
    assert _C.find_overlap([*places, places[7]])[0] == (7, 252)


PART = [POOL[:96].view(1, 12, 1, 8)]
PLAN = adsc.make_plan(adsc.CompressionSchedule.parse("1:1/4", num_layers=2), [0, 12], [(0, 2, 8)])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("k", "v", "names"),
    [
        (PART, [POOL[88:184].view(1, 12, 1, 8)], r"k_caches\[0\], v_caches\[0\]"),
        ([POOL[:8].view(1, 1, 1, 8).expand(1, 12, 1, 8)], None, r"k_caches\[0\]"),
    ],
)
def test_the_ops_refuse(backend: str, k: list[Tensor], v: list[Tensor] | None, names: str) -> None:
    """Whoever looks, the op or Python, in the words of the arguments that were given."""
    before = POOL.clone()
    with adsc.backend(backend), pytest.raises(ValueError, match=f"^{names}: .*share memory"):
        ops.compact_kv_(k, v, PLAN.stages[1])
    assert torch.equal(POOL, before)
