"""Variable-length attention and the cache it reads, against attention written out in full."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels import (
    CompressionSchedule,
    attention,
    attention_backends,
    attention_calls,
    make_plan,
)
from adsc_kernels.attention import CachedKeys, varlen_attention
from adsc_kernels.attention_backends import Backend
from adsc_kernels.attention_keys import PagedKeys
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


class Stubs:
    """Of kernels that don't run without a GPU, with the signatures that they are documented with.

    `calls`: the bounds on the longest that each was told.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def flash_attn(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        self.calls.append((max_seqlen_q, max_seqlen_k))
        assert causal
        if block_table is not None:
            k, v = (packed(x, block_table, cu_seqlens_k.diff().tolist()) for x in (k, v))
        return plain(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), softmax_scale)

    def flash_attn_3(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
        seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        self.calls.append((max_seqlen_q, max_seqlen_k))
        assert causal
        assert num_splits == 0
        return plain(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), softmax_scale)

    def flash_attn_4(
        self, q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None,
        gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False, score_mod=None, mask_mod=None, return_lse=False,
    ):  # fmt: skip
        self.calls.append((max_seqlen_q, max_seqlen_k))
        assert causal
        return plain(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), softmax_scale), None

    def varlen_attn(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        self.calls.append((max_q, max_k))
        assert window_size == (-1, 0)
        assert enable_gqa
        return plain(query, key, value, cu_seq_q.tolist(), cu_seq_k.tolist(), scale)

    def ragged_wrapper(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False):
        assert float_workspace_buffer.nbytes == 128 << 20
        return Ragged()

    def paged_wrapper(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False):
        assert float_workspace_buffer.nbytes == 128 << 20
        return Paged()

    def decode_attention(
        self, q, k, v, bounds, longest, scale, shares=0, address=None, blocks=None
    ):
        """Our own, which Triton's interpreter runs in interpreted/."""
        cu = bounds.tolist()
        spans = zip(cu[::2], cu[1::2], strict=False)
        each = [one_sequence(q[b : b + 1], k[c:d], v[c:d], scale) for b, (c, d) in enumerate(spans)]
        return torch.cat(each)


class Ragged:
    def plan(
        self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None,
        custom_mask=None, packed_custom_mask=None, causal=False, sm_scale=None,
        q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        assert causal
        assert q_data_type == kv_data_type == torch.float32
        self.planned = (qo_indptr.tolist(), kv_indptr.tolist(), sm_scale)
        self.shape = (num_qo_heads, num_kv_heads, head_dim_qk)

    def run(self, q, k, v):
        assert self.shape == (q.shape[1], k.shape[1], q.shape[2])
        return plain(q, k, v, *self.planned)


def packed(pages: Tensor, table: Tensor, lens: list[int]) -> Tensor:
    """Rows of [blocks, block_size, H, D] one sequence behind the other."""
    rows = zip(table, lens, strict=True)
    return torch.cat([pages[some[some >= 0].long()].flatten(0, 1)[:n] for some, n in rows])


class Paged:
    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads,
        num_kv_heads, head_dim_qk, page_size, head_dim_vo=None, custom_mask=None,
        packed_custom_mask=None, causal=False, pos_encoding_mode="NONE", sm_scale=None,
        q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        assert causal
        assert q_data_type == kv_data_type == torch.float32
        assert paged_kv_indptr.dtype == paged_kv_indices.dtype == torch.int32
        assert paged_kv_last_page_len.dtype == torch.int32
        self.planned = (qo_indptr.tolist(), sm_scale, page_size)
        self.pages = paged_kv_indices.split(paged_kv_indptr.diff().tolist())
        self.last = paged_kv_last_page_len.tolist()

    def run(self, q, kv):
        cu_q, scale, size = self.planned
        lens = [max(len(p) - 1, 0) * size + n for p, n in zip(self.pages, self.last, strict=True)]
        table = torch.nn.utils.rnn.pad_sequence(self.pages, True, -1)
        cu_k = [0, *torch.tensor(lens).cumsum(0).tolist()]
        return plain(q, *(packed(x, table, lens) for x in kv), cu_q, cu_k, scale)


@pytest.fixture
def stubs(monkeypatch):
    made = Stubs()
    modules = {
        "flash_attn": {"flash_attn_varlen_func": made.flash_attn},
        "flash_attn_interface": {"flash_attn_varlen_func": made.flash_attn_3},
        "flash_attn.cute": {"flash_attn_varlen_func": made.flash_attn_4},
        "torch.nn.attention.varlen": {"varlen_attn": made.varlen_attn},
        "flashinfer": {
            "BatchPrefillWithRaggedKVCacheWrapper": made.ragged_wrapper,
            "BatchPrefillWithPagedKVCacheWrapper": made.paged_wrapper,
        },
        "adsc_kernels.triton.decode_attention": {"decode_attention": made.decode_attention},
    }
    for name, functions in modules.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    def why_not(self, phase, *kind):
        return None if phase in self.phases else "another phase"

    monkeypatch.setattr(Backend, "why_not", why_not)
    monkeypatch.setattr(attention_calls, "asks_for_groups", lambda: True)
    return made


VARLEN = ("flash_attn_3", "flash_attn_4", "flash_attn", "torch_varlen")


@pytest.mark.parametrize("backend", [*VARLEN, "flashinfer", "auto"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_what_the_kernels_are_called_with(stubs, backend, kv_heads):
    q, k, v = tensors(1, 12, 4, kv_heads)
    keys = CachedKeys.build((1, 0), (5, 3), (6, 6), torch.device("cpu"))
    want = varlen_attention(q, k, v, rows(1, 0), keys=keys, backend="sdpa")
    packed_q, packed_k, packed_v = tensors(5, 5, 4, kv_heads)
    want_packed = varlen_attention(packed_q, packed_k, packed_v, rows(3, 2), backend="sdpa")
    got = varlen_attention(q, k, v, rows(1, 0), keys=keys, scale=8**-0.5, backend=backend)
    torch.testing.assert_close(got, want)
    got = varlen_attention(packed_q, packed_k, packed_v, rows(3, 2), scale=8**-0.5, backend=backend)
    torch.testing.assert_close(got, want_packed)
    if backend != "flashinfer":
        # A bound of 1 would make flash-attn 2 take every sequence to have exactly one row.
        assert stubs.calls == [(2, 5), (3, 3)]


@pytest.mark.parametrize("backend", [*VARLEN, "triton", "flashinfer", "auto"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_step_of_decoding(stubs, backend, kv_heads):
    wide, k, v = tensors(3, 18, 4 + 2 * kv_heads, kv_heads)
    q, k = wide[:, :4], k[:, :kv_heads]  # as one GEMM makes them
    keys = CachedKeys.build((1, 1, 1), (5, 3, 1), (6, 11, 1), torch.device("cpu"))
    want = varlen_attention(q, k, v, rows(1, 1, 1), keys=keys, backend="sdpa")
    got = varlen_attention(q, k, v, rows(1, 1, 1), keys=keys, scale=8**-0.5, backend=backend)
    torch.testing.assert_close(got, want)
    assert len(stubs.calls) == (backend in VARLEN)  # "auto" takes our own
    got = varlen_attention(q, k, v, rows(1, 1, 1), keys=keys, backend="triton")
    torch.testing.assert_close(got, want)  # it wants a number for the scale, and gets one


@pytest.mark.parametrize("backend", ["flash_attn", "flashinfer"])
@pytest.mark.parametrize("q_lens", [(2, 0, 1), (1, 1, 1)])
def test_what_paged_kernels_are_called_with(stubs, backend, q_lens):
    q, k, v = tensors(3, 5 * 256, 4, 2)
    table = np.array([[4, 1], [0, -1], [3, 2]], np.int32)
    keys = PagedKeys.build((300, 256, 512), 256, table, torch.device("cpu"))
    options = {"keys": keys, "scale": 8**-0.5}
    want = varlen_attention(q, k, v, rows(*q_lens), backend="sdpa", **options)
    got = varlen_attention(q, k, v, rows(*q_lens), backend=backend, **options)
    torch.testing.assert_close(got, want)
    assert stubs.calls == ([(2, 512)] if backend == "flash_attn" else [])


def test_our_own_is_for_steps_only(stubs):
    q, k, v = tensors(3, 3, 4, 4)
    with pytest.raises(UnsupportedError, match="'triton': another phase"):
        varlen_attention(q, k, v, rows(3), backend="triton")
    keys = CachedKeys.build((1,) * 3, (1,) * 3, (1,) * 3, torch.device("cpu"))
    odd = k.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="k: expected rows contiguous"):
        varlen_attention(q, odd, v, rows(1, 1, 1), keys=keys, backend="triton")


def test_what_a_backend_does_not_take():
    """Where its software is there and the call is none for it: it says what it takes."""
    kernel = Backend(run=min, lacks=lambda device: None, phases=("decode",))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert "is for decode, this is prefill" in kernel.why_not("prefill", gpu, torch.half, 64)
    assert "takes float16, bfloat16" in kernel.why_not("decode", gpu, torch.float32, 64)
    assert "up to 256 in steps of 8, got 60" in kernel.why_not("decode", gpu, torch.half, 60)
    assert "runs on CUDA" in kernel.why_not("decode", cpu, torch.half, 64)
    some = replace(kernel, head_dims=(64, 128), capability=None)
    assert "takes head sizes 64, 128, got 256" in some.why_not("decode", gpu, torch.half, 256)
    assert some.why_not("decode", cpu, torch.half, 128) is None
    assert "takes no blocks, the cache is in blocks of 16" in some.why_not(
        "decode", cpu, torch.half, 128, 16
    )
    large = replace(some, paged=256)
    assert "multiple of 256 rows" in large.why_not("decode", cpu, torch.half, 128, 128)
    assert large.why_not("decode", cpu, torch.half, 128, 512) is None


def test_cudnn_is_for_prompts_of_one_length(stubs, monkeypatch):
    """Asked for by name: it computes those, and refuses what is no batch."""
    monkeypatch.setattr("torch.nn.attention.sdpa_kernel", lambda backend: nullcontext())
    wide, k, v = tensors(8, 8, 12, 4)
    q = wide[:, :4]  # as one GEMM makes them
    for scale in (None, 0.2):
        got = varlen_attention(q, k, v, rows(4, 4), scale=scale, backend="cudnn")
        want = varlen_attention(q, k, v, rows(4, 4), scale=scale, backend="sdpa")
        torch.testing.assert_close(got, want)
    keys = CachedKeys.build((4, 4), (4, 4), (4, 4), torch.device("cpu"))
    for stage, heads, held in ((rows(5, 3), 4, None), (rows(4, 4), 2, None), (rows(4, 4), 4, keys)):
        with pytest.raises(UnsupportedError, match="'cudnn': takes whole prompts of one length"):
            varlen_attention(q, k[:, :heads], v[:, :heads], stage, keys=held, backend="cudnn")
    assert all("cudnn" not in names for names in attention_backends.ORDER.values())


def test_an_address_is_for_what_reads_it(stubs):
    """Others would read the rows that only show its form."""
    q, k, v = tensors(1, 4, 4, 4)
    keys = CachedKeys.build((1,), (4,), (4,), torch.device("cpu"))
    keys = replace(keys, address=torch.zeros(2, dtype=torch.int64))
    for backend in (*VARLEN, "flashinfer", "sdpa"):
        with pytest.raises(UnsupportedError, match=f"'{backend}': takes keys by no address"):
            varlen_attention(q, k, v, rows(1), keys=keys, backend=backend)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=6).filter(any),
    st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    st.booleans(),
)
def test_one_row_at_most_of_each_sequence(lens, heads, cached):
    """flash-attn 2 at max_seqlen_q = 1 with grouped heads takes each sequence to have one row."""

    def flash_attn_varlen_func(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, **_
    ):
        cu = [cu_seqlens_q, cu_seqlens_k]
        if max_seqlen_q == 1 and q.shape[1] != k.shape[1]:
            cu[0] = torch.arange(len(cu_seqlens_q))
        return plain(q, k, v, *(x.tolist() for x in cu), softmax_scale or 8**-0.5)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    total = sum(lens)
    lengths = [3 + b for b in range(len(lens))] if cached else lens
    capacities = [n + 1 for n in lengths]
    keys = CachedKeys.build(lens, lengths, capacities, torch.device("cpu")) if cached else None
    q, k, v = tensors(total, sum(capacities) if cached else total, *heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", module)
        patch.setattr(Backend, "why_not", lambda *_, **__: None)
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
    assert all(isinstance(reason, str) for name, reason in reasons.items() if name != "sdpa")
    q, k, v = tensors(3, 3, 4, 4)
    for name in (*VARLEN, "triton", "flashinfer"):
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
    groups = {"enable_gqa": True} if attention_calls.asks_for_groups() else {}
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
