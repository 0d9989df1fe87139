"""Whether the tensors of a cache share memory: exact, against all addresses one by one."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels.kv.overlap import check_overlap

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
        reaches = check_overlap(tensors, names(tensors))
        begin = POOL.data_ptr()
        assert [(r.begin - begin, r.end - begin) for r in reaches] == [
            (min(a), max(a) + 1) for a in own
        ]
        return
    with pytest.raises(ValueError, match="share memory"):
        check_overlap(tensors, names(tensors))


@pytest.mark.parametrize("order", ["pages", "tokens"])
def test_a_pool_of_many_layers_takes_a_sort(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two of 252 views are compared, however they interleave."""
    shape = (3, 252, 4, 2) if order == "pages" else (3, 4, 252, 2)
    pool = torch.zeros(shape)
    tensors = list(pool.unbind(1 if order == "pages" else 2))
    monkeypatch.setattr("adsc_kernels.kv.overlap._share_memory", None)
    assert len(check_overlap(tensors, names(tensors))) == 252
