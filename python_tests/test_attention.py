"""Variable-length attention and the cache it reads, against attention written out in full."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels import CompressionSchedule, attention, make_plan
from adsc_kernels.attention import CachedKeys, varlen_attention
from adsc_kernels.cache import KVCache, Phase, StageCache
from adsc_kernels.errors import UnsupportedError


def rows(*lens: int) -> SimpleNamespace:
    cu = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32)
    return SimpleNamespace(cu_seqlens=cu, seq_lens=lens, max_seqlen=max(lens), num_tokens=sum(lens))


def one_sequence(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax over the keys up to each query row's own, the last row seeing all."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for i in range(q.shape[0]):
        seen = k.shape[0] - q.shape[0] + i + 1
        for h in range(q.shape[1]):
            shares = (k[:seen, h // group] @ q[i, h] * scale).softmax(0)
            out[i, h] = shares @ v[:seen, h // group]
    return out


def plain(q: Tensor, k: Tensor, v: Tensor, cu_q, cu_k, scale: float) -> Tensor:
    """What a varlen kernel computes from cumulative lengths."""
    spans = zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True)
    return torch.cat([one_sequence(q[a:b], k[c:d], v[c:d], scale) for a, b, c, d in spans])


def tensors(num_q: int, num_k: int, heads: int, kv_heads: int, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_q + 10 * num_k)
    shapes = ((num_q, heads, size), (num_k, kv_heads, size), (num_k, kv_heads, size))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_packed_keys(heads, kv_heads):
    stage = rows(5, 0, 1, 7)
    q, k, v = tensors(13, 13, heads, kv_heads)
    cu = stage.cu_seqlens.tolist()
    got = varlen_attention(q, k, v, stage)
    torch.testing.assert_close(got, plain(q, k, v, cu, cu, 8**-0.5))
    got = varlen_attention(q, k, v, stage, scale=0.1)
    torch.testing.assert_close(got, plain(q, k, v, cu, cu, 0.1))


LAYOUTS = [
    ((3, 1, 0, 4), (3, 6, 2, 9), (5, 6, 2, 12)),
    ((1, 1), (4, 7), (8, 8)),
    ((1, 0), (4, 7), (4, 7)),
    ((2,), (5,), (9,)),
]


@pytest.mark.parametrize(("q_lens", "lens", "capacities"), LAYOUTS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_keys_in_a_cache(q_lens, lens, capacities, kv_heads):
    stage = rows(*q_lens)
    q, k, v = tensors(sum(q_lens), sum(capacities), 4, kv_heads)
    keys = CachedKeys.build(q_lens, lens, capacities, torch.device("cpu"))
    want, first = [], 0
    for b, n in enumerate(q_lens):
        at = sum(capacities[:b])
        mine = slice(at, at + lens[b])
        want.append(one_sequence(q[first : first + n], k[mine], v[mine], 8**-0.5))
        first += n
    torch.testing.assert_close(varlen_attention(q, k, v, stage, keys=keys), torch.cat(want))
    # The same through the lengths that the varlen kernels get, where gaps are sequences too.
    cu = keys.cu_seqlens_q.tolist(), keys.cu_seqlens_k.tolist()
    assert keys.cu_seqlens_q.dtype == keys.cu_seqlens_k.dtype == torch.int32
    torch.testing.assert_close(plain(q, k, v, *cu, 8**-0.5), torch.cat(want))
    assert keys.max_len == max(lens)


def test_what_the_kernels_are_called_with(monkeypatch):
    """Neither runs without a GPU: here they are stand-ins with the real signatures."""
    calls = []

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        calls.append((max_seqlen_q, max_seqlen_k))
        assert causal
        return plain(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), softmax_scale)

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        calls.append((max_q, max_k))
        assert window_size == (-1, 0)
        assert enable_gqa
        return plain(query, key, value, cu_seq_q.tolist(), cu_seq_k.tolist(), scale)

    fakes = {"flash_attn": flash_attn_varlen_func, "torch.nn.attention.varlen": varlen_attn}
    for name, function in fakes.items():
        module = ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(attention, "_why_not", lambda *_, **__: None)
    monkeypatch.setattr(attention, "_asks_for_groups", lambda: True)
    for kv_heads in (4, 2):
        q, k, v = tensors(1, 12, 4, kv_heads)
        keys = CachedKeys.build((1, 0), (5, 3), (6, 6), torch.device("cpu"))
        want = varlen_attention(q, k, v, rows(1, 0), keys=keys, backend="sdpa")
        packed_q, packed_k, packed_v = tensors(5, 5, 4, kv_heads)
        want_packed = varlen_attention(packed_q, packed_k, packed_v, rows(3, 2), backend="sdpa")
        for backend in ("flash_attn", "torch_varlen", "auto"):
            calls.clear()
            got = varlen_attention(q, k, v, rows(1, 0), keys=keys, scale=8**-0.5, backend=backend)
            torch.testing.assert_close(got, want)
            got = varlen_attention(
                packed_q, packed_k, packed_v, rows(3, 2), scale=8**-0.5, backend=backend
            )
            torch.testing.assert_close(got, want_packed)
            # A bound of 1 would make flash-attn 2 take every sequence to have exactly one row.
            assert calls == [(2, 5), (3, 3)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=6).filter(any),
    st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    st.booleans(),
)
def test_one_row_at_most_of_each_sequence(lens, heads, cached):
    """flash-attn 2 at max_seqlen_q = 1 with grouped heads takes each sequence to have one row."""

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, **options):
        if max_q == 1 and q.shape[1] != k.shape[1]:
            cu_q = torch.arange(len(cu_q))
        return plain(q, k, v, cu_q.tolist(), cu_k.tolist(), options["softmax_scale"] or 8**-0.5)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    total = sum(lens)
    lengths = [3 + b for b in range(len(lens))] if cached else lens
    capacities = [n + 1 for n in lengths]
    keys = CachedKeys.build(lens, lengths, capacities, torch.device("cpu")) if cached else None
    q, k, v = tensors(total, sum(capacities) if cached else total, *heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", module)
        patch.setattr(attention, "_why_not", lambda *_, **__: None)
        got = varlen_attention(q, k, v, rows(*lens), keys=keys, backend="flash_attn")
    want = varlen_attention(q, k, v, rows(*lens), keys=keys, backend="sdpa")
    torch.testing.assert_close(got, want)


def test_no_rows_at_all():
    q, k, v = tensors(0, 4, 4, 2)
    keys = CachedKeys.build((0,), (4,), (4,), torch.device("cpu"))
    assert varlen_attention(q, k, v, rows(0), keys=keys).shape == (0, 4, 8)


def test_backends_say_why_they_do_not_run():
    reasons = attention.available("cpu", torch.float32)
    assert list(reasons) == list(attention.BACKENDS)
    assert reasons["sdpa"] is None
    assert all(isinstance(reasons[name], str) for name in ("flash_attn", "torch_varlen"))
    q, k, v = tensors(3, 3, 4, 4)
    for name in ("flash_attn", "torch_varlen"):
        with pytest.raises(UnsupportedError, match=name):
            varlen_attention(q, k, v, rows(3), backend=name)
    with pytest.raises(ValueError, match="backend"):
        varlen_attention(q, k, v, rows(3), backend="best")


def test_torch_varlen_takes_what_it_is_called_with():
    """The stand-in above has the real one's parameters: those of the torch that is installed."""
    if "varlen_attn takes no" in str(attention.available("cpu")["torch_varlen"]):
        pytest.skip("this torch's varlen_attn is too old, and said so")
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    q = torch.empty(3, 4, 64, device="meta", dtype=torch.bfloat16)
    k = torch.empty(9, 2, 64, device="meta", dtype=torch.bfloat16)
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    groups = {"enable_gqa": True} if attention._asks_for_groups() else {}
    out = varlen.varlen_attn(q, k, k, cu, cu, 2, 5, scale=None, window_size=(-1, 0), **groups)
    assert out.shape == q.shape


BAD = {
    "a head size that differs": (
        lambda q, k, v: (q, k[..., :4], v[..., :4]),
        ValueError,
        "q, k, v",
    ),
    "values of another shape": (lambda q, k, v: (q, k, v[:2]), ValueError, "q, k, v"),
    "no heads dimension": (lambda q, k, v: (q[:, 0], k, v), ValueError, "q, k, v"),
    "heads that don't divide": (lambda q, k, v: (q[:, :3], k, v), ValueError, "k: "),
    "mixed dtypes": (lambda q, k, v: (q.double(), k, v), TypeError, "dtype"),
    "missing query rows": (lambda q, k, v: (q[:2], k, v), ValueError, "q: "),
    "missing key rows": (lambda q, k, v: (q, k[:2], v[:2]), ValueError, "k: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        varlen_attention(*change(*tensors(3, 3, 4, 2)), rows(3))


def test_keys_that_do_not_fit():
    q, k, v = tensors(3, 6, 4, 2)
    short = CachedKeys.build((3,), (2,), (6,), torch.device("cpu"))
    with pytest.raises(ValueError, match="at least"):
        varlen_attention(q, k, v, rows(3), keys=short)
    outside = CachedKeys.build((3,), (7,), (8,), torch.device("cpu"))
    with pytest.raises(ValueError, match="inside"):
        varlen_attention(q, k, v, rows(3), keys=outside)


# ---- The cache --------------------------------------------------------------------------------


def test_a_cache_keeps_its_rows_as_it_is_fitted_anew():
    cache = StageCache(range(3, 5), 2, 1, 1, torch.float32, torch.device("cpu"))
    schedule = CompressionSchedule.dense(5)
    pieces: list[list[Tensor]] = [[], []]
    for step, (ends, room) in enumerate([((2, 3), (2, 3)), ((4, 3), (6, 4)), ((5, 6), (5, 9))]):
        chunks = list(zip(cache.lens, ends, strict=True))
        stage = make_plan(schedule, [0, 9, 18], [], chunks=chunks).stages[0]
        cache.fit(room)
        slots, keys = cache.begin(stage, Phase.LATER_TURN)
        assert keys is not None
        new = torch.arange(stage.num_tokens, dtype=torch.float32)[:, None, None] + 100 * step
        for mine, part in zip(pieces, new.split(stage.seq_lens), strict=True):
            mine.append(part)
        for layer, k, v in zip(cache.layers, cache.k, cache.v, strict=True):
            k[slots], v[slots] = new + layer, -new - layer
            assert k.shape == (sum(room), 1, 1)
            for b, start in enumerate(keys.starts):
                want = torch.cat(pieces[b])
                assert torch.equal(k[start : start + ends[b]], want + layer)
                assert torch.equal(v[start : start + ends[b]], -want - layer)
        cache.lens = stage.kv_lens
        assert cache.allocated_bytes == 2 * 2 * sum(room) * 4
    with pytest.raises(ValueError, match="at least"):
        cache.fit((5, 5))


def test_a_cache_refuses_a_plan_that_is_not_next():
    schedule = CompressionSchedule.parse("1:1/2", num_layers=2)
    cache = KVCache(schedule, 1, 1, 4, torch.float32, "cpu")
    whole = make_plan(schedule, [0, 9], [(0, 2, 4)])
    with pytest.raises(ValueError, match="room"):
        cache.stages[0].begin(whole.stages[0], Phase.PREFILL)
    cache.fit(whole)
    row = 2 * 4 * 4  # K and V of one row in one layer
    assert cache.bytes_per_stage == (9 * row, 7 * row)
    later = make_plan(schedule, [0, 9], [(0, 2, 4)], chunks=[(3, 9)])
    with pytest.raises(ValueError, match="cached"):
        cache.stages[1].begin(later.stages[1], Phase.LATER_TURN)
