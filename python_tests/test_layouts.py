"""Each engine's cache, shaped as the engine makes it, through its adapter and the compaction ops.

An engine here is raw tensors and `row`, its own rule for where a token's K or V lies. Neither knows
the adapter: what the op should do is written with `row` alone, and compared over whole storages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from cache_name import CACHE
from torch import Tensor

import adsc_kernels as adsc
from adsc_kernels.integrations import layouts

LAYERS, BLOCKS, HEADS, DIM = 2, 64, 3, 8
K, V = 0, 1


@dataclass
class Engine:
    block_size: int
    storages: list[Tensor]  # all that the engine allocated
    row: Callable[[int, int, int, int], Tensor]  # layer, K or V, block, offset -> view [H, D]
    adapt: Callable[[Tensor], layouts.PagedCache]


def noise(*shape: int) -> Tensor:
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)


def vllm(block_size: int, tensors: list[Tensor], row, storages=None, **options) -> Engine:
    def adapt(table: Tensor) -> layouts.PagedCache:
        return layouts.from_vllm(
            tensors,
            table,
            block_size=block_size,
            num_kv_heads=HEADS,
            head_dim=DIM,
            **options,
        )

    return Engine(block_size, storages or tensors, row, adapt)


def vllm_planes_first(block_size: int) -> Engine:
    kv = [noise(2, BLOCKS, block_size, HEADS, DIM) for _ in range(LAYERS)]
    return vllm(block_size, kv, lambda n, plane, b, t: kv[n][plane, b, t])


def vllm_blocks_first(block_size: int) -> Engine:
    kv = [noise(BLOCKS, 2, block_size, HEADS, DIM) for _ in range(LAYERS)]
    return vllm(block_size, kv, lambda n, plane, b, t: kv[n][b, plane, t])


def vllm_blocks_first_hnd(block_size: int) -> Engine:
    """The same shape, in memory with heads before tokens."""
    kv = [noise(BLOCKS, 2, HEADS, block_size, DIM).transpose(2, 3) for _ in range(LAYERS)]
    return vllm(block_size, kv, lambda n, plane, b, t: kv[n][b, plane, t])


def vllm_packed(order: str) -> Callable[[int], Engine]:
    """Logical [L, B, H, N, C], as one of vLLM's orders lays it in memory; C holds K, then V."""

    def make(block_size: int) -> Engine:
        sizes = dict(L=LAYERS, B=BLOCKS, H=HEADS, N=block_size, C=2 * DIM)
        storage = noise(*(sizes[axis] for axis in order))
        logical = storage.permute(*(order.index(axis) for axis in "LBHNC"))
        kv = list(logical.unbind(0))

        def row(n: int, plane: int, b: int, t: int) -> Tensor:
            # As its attention backends split it
            return kv[n].transpose(1, 2).split(DIM, dim=-1)[plane][b, t]

        return vllm(block_size, kv, row, [storage], packing="content")

    return make


def vllm_cpu(block_size: int) -> Engine:
    kv = [noise(BLOCKS, HEADS, block_size, 2 * DIM) for _ in range(LAYERS)]

    def row(n: int, plane: int, b: int, t: int) -> Tensor:
        return kv[n].view(BLOCKS, HEADS, block_size * 2, -1).chunk(2, dim=2)[plane][b, :, t]

    return vllm(block_size, kv, row, packing="halves")


def flashinfer(layout: str, pair: bool = False) -> Callable[[int], Engine]:
    def make(page_size: int) -> Engine:
        inner = (page_size, HEADS, DIM) if layout == "NHD" else (HEADS, page_size, DIM)
        planes = [[noise(BLOCKS, *inner) for _ in (K, V)] for _ in range(LAYERS)]
        kv = [tuple(two) for two in planes] if pair else [torch.stack(two, 1) for two in planes]

        def row(n: int, plane: int, b: int, t: int) -> Tensor:
            page = kv[n][plane][b] if pair else kv[n][b, plane]
            return page[t] if layout == "NHD" else page[:, t]

        def adapt(table: Tensor) -> layouts.PagedCache:
            return layouts.from_flashinfer(kv, table, page_size=page_size, kv_layout=layout)

        return Engine(page_size, [x for two in planes for x in two] if pair else kv, row, adapt)

    return make


def sglang(page_size: int) -> Engine:
    slots = BLOCKS * page_size
    buffers = [[noise(slots, HEADS, DIM) for _ in range(LAYERS)] for _ in (K, V)]

    def row(n: int, plane: int, b: int, t: int) -> Tensor:
        return buffers[plane][n][b * page_size + t]

    def adapt(table: Tensor) -> layouts.PagedCache:
        return layouts.from_sglang(*buffers, table, page_size=page_size)

    return Engine(page_size, [*buffers[K], *buffers[V]], row, adapt)


def tensorrt_llm(layout: str) -> Callable[[int], Engine]:
    """One pool, a block's layers side by side, of which get_buffers slices and reshapes a layer."""

    def make(block_size: int) -> Engine:
        pool = noise(BLOCKS, LAYERS, 2, HEADS * block_size * DIM)
        inner = (HEADS, block_size) if layout == "HND" else (block_size, HEADS)
        buffers = [pool[:, n].reshape(BLOCKS, 2, *inner, DIM) for n in range(LAYERS)]

        def row(n: int, plane: int, b: int, t: int) -> Tensor:
            block = pool[b, n, plane].view(*inner, DIM)
            return block[:, t] if layout == "HND" else block[t]

        def adapt(table: Tensor) -> layouts.PagedCache:
            return layouts.from_tensorrt_llm(
                buffers, table, tokens_per_block=block_size, kv_layout=layout
            )

        return Engine(block_size, [pool], row, adapt)

    return make


ENGINES = {
    "vllm-2N": vllm_planes_first,
    "vllm-N2": vllm_blocks_first,
    "vllm-N2-hnd": vllm_blocks_first_hnd,
    **{
        f"vllm-{order}": vllm_packed(order)
        for order in ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
    },
    "vllm-cpu": vllm_cpu,
    "flashinfer-nhd": flashinfer("NHD"),
    "flashinfer-hnd": flashinfer("HND"),
    "flashinfer-nhd-pair": flashinfer("NHD", pair=True),
    "flashinfer-hnd-pair": flashinfer("HND", pair=True),
    "sglang": sglang,
    "tensorrt-llm-hnd": tensorrt_llm("HND"),
    "tensorrt-llm-nhd": tensorrt_llm("NHD"),
}


@pytest.mark.parametrize("name", ENGINES)
def test_views_are_the_engines_own_memory(name):
    engine = ENGINES[name](4)
    table = torch.zeros(1, 1, dtype=torch.int32)
    cache = engine.adapt(table)
    assert cache.block_table is table
    assert cache.block_size == 4
    owners = {x.untyped_storage().data_ptr() for x in engine.storages}
    for plane, views in ((K, cache.k_caches), (V, cache.v_caches)):
        assert len(views) == LAYERS
        for n, view in enumerate(views):
            assert view.untyped_storage().data_ptr() in owners
            rows = view if cache.layout == "NHD" else view.transpose(1, 2)
            assert rows.shape == (BLOCKS, 4, HEADS, DIM)
            for block, offset in ((0, 0), (0, 3), (5, 2), (BLOCKS - 1, 3)):
                own = engine.row(n, plane, block, offset)
                assert rows[block, offset].data_ptr() == own.data_ptr()
                assert rows[block, offset].stride() == own.stride()


# ---- Compaction in each engine's cache ----

SCHEDULE = adsc.CompressionSchedule.parse("1:1/3@center", 2)
LAYOUT = ([0, 30, 30, 47], [(0, 5, 16), (0, 22, 6), (2, 0, 12)])  # two pictures, nothing, one
SEQ_LENS = (33, 2, 24)  # with generated text behind


def block_table(block_size: int) -> Tensor:
    """Blocks in no order, int32 rows of a wider table; stale ones behind each sequence's own."""
    blocks = torch.randperm(BLOCKS - 1)[: sum(-(-n // block_size) for n in SEQ_LENS)] + 1
    table = torch.full((5, 70), BLOCKS + 7, dtype=torch.int32)
    first = 0
    for b, n in enumerate(SEQ_LENS):
        count = -(-n // block_size)
        table[b, :count] = blocks[first : first + count]
        first += count
    return table[:3, : -(-max(SEQ_LENS) // block_size) + 1]


def survivors(stage) -> list[list[int]]:
    """The cached rows of each sequence that are left, its suffix among them."""
    rows, left, first = stage.keep_indices().tolist(), [], 0
    for length, total in zip(stage.seq_lens_in, SEQ_LENS, strict=True):
        own = [r - first for r in rows if first <= r < first + length]
        left.append(own + list(range(length, total)))
        first += length
    return left


def everything(engine: Engine, table: Tensor, lens) -> dict[tuple[int, ...], Tensor]:
    """A copy of every cached row, by layer, K or V, sequence and number."""
    size = engine.block_size
    return {
        (n, plane, b, r): engine.row(n, plane, int(table[b, r // size]), r % size).clone()
        for n in range(LAYERS)
        for plane in (K, V)
        for b, length in enumerate(lens)
        for r in range(length)
    }


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("name", ENGINES)
def test_compaction_in_place(name, block_size):
    engine, table = ENGINES[name](block_size), block_table(block_size)
    stage = adsc.make_plan(SCHEDULE, *LAYOUT).stages[1]
    before = [x.clone() for x in engine.storages]
    rows, left = everything(engine, table, SEQ_LENS), survivors(stage)
    for n in range(LAYERS):
        for plane in (K, V):
            for b, own in enumerate(left):
                for i, source in enumerate(own):
                    place = engine.row(n, plane, int(table[b, i // block_size]), i % block_size)
                    place.copy_(rows[n, plane, b, source])
    want = [x.clone() for x in engine.storages]
    for x, old in zip(engine.storages, before, strict=True):
        x.copy_(old)

    cache = engine.adapt(table)
    result = adsc.ops.compact_paged_kv_(
        cache,
        stage=stage,
        seq_lens=SEQ_LENS,
    )
    assert all(x.equal(y) for x, y in zip(engine.storages, want, strict=True))
    lens = [len(own) for own in left]
    assert result.seq_lens.host == tuple(lens)
    used = {int(t) for b, n in enumerate(SEQ_LENS) for t in table[b, : -(-n // block_size)]}
    still = {int(t) for b, n in enumerate(lens) for t in table[b, : -(-n // block_size)]}
    assert sorted(result.free_blocks.tolist()) == sorted(used - still)


@pytest.mark.parametrize("align", [None, "block"])
@pytest.mark.parametrize("name", ENGINES)
def test_compaction_by_the_table(name, align):
    engine, table = ENGINES[name](4), block_table(4)
    stage = adsc.make_plan(SCHEDULE, *LAYOUT, block_size=4, align=align).stages[1]
    rows, left = everything(engine, table, SEQ_LENS), survivors(stage)
    cache = engine.adapt(table)
    result = adsc.ops.compact_paged_kv_(
        cache,
        stage=stage,
        seq_lens=SEQ_LENS,
        edit_table=True,
    )
    lens = [len(own) for own in left]
    for (n, plane, b, i), got in everything(engine, result.block_table, lens).items():
        assert got.equal(rows[n, plane, b, left[b][i]])
    if align:
        # Each picture gave whole blocks, and of what follows it only the block it ends in is new.
        for b, (own, total) in enumerate(zip(left, SEQ_LENS, strict=True)):
            gone = total - len(own)
            assert gone % 4 == 0
            assert len(result.released_blocks[b]) == gone // 4
            behind = range(
                -(-own.index(28 if b == 0 else 12) // 4) if gone else 0, -(-len(own) // 4)
            )
            assert len(behind) > 0
            for page in behind:
                assert result.block_table[b, page] == table[b, page + gone // 4]


def test_nothing_moves_at_page_size_one():
    """SGLang: only req_to_token changes."""
    engine = sglang(1)
    requests = [3, 0, 5]
    req_to_token = torch.zeros(6, 40, dtype=torch.int32)
    table = block_table(1)
    for b, n in enumerate(SEQ_LENS):
        req_to_token[requests[b], :n] = table[b, :n]
    stage = adsc.make_plan(SCHEDULE, *LAYOUT).stages[1]
    rows, left = everything(engine, table, SEQ_LENS), survivors(stage)
    before = [x.clone() for x in engine.storages]
    cache = engine.adapt(layouts.req_to_token_to_block_table(req_to_token, requests))
    result = adsc.ops.compact_paged_kv_(
        cache,
        stage=stage,
        seq_lens=SEQ_LENS,
        edit_table=True,
    )
    assert all(x.equal(y) for x, y in zip(engine.storages, before, strict=True))
    layouts.block_table_to_req_to_token_(req_to_token, requests, result.block_table)
    for b, own in enumerate(left):
        for i, source in enumerate(own):
            slot = int(req_to_token[requests[b], i])
            assert engine.row(1, V, slot, 0).equal(rows[1, V, b, source])
        assert not req_to_token[requests[b], len(own) :].any()
    assert len(result.free_blocks) == sum(SEQ_LENS) - sum(map(len, left))


def test_vllm_by_name_and_with_values_of_another_size():
    kv = {f"layers.{n}.attn": noise(BLOCKS, HEADS, 4, DIM + 2) for n in range(LAYERS)}
    cache = layouts.from_vllm(
        kv,
        torch.zeros(1, 1, dtype=torch.int32),
        block_size=4,
        num_kv_heads=HEADS,
        head_dim=DIM,
        head_dim_v=2,
        packing="content",
    )
    assert [x.shape[-1] for x in (*cache.k_caches, *cache.v_caches)] == [DIM, DIM, 2, 2]
    assert cache.v_caches[1][3, 1, 2].equal(kv["layers.1.attn"][3, 1, 2, DIM:])


def vllm_arguments(*shape: int, **change) -> dict:
    options = dict(block_size=4, num_kv_heads=HEADS, head_dim=DIM, packing="content") | change
    return dict(kv_caches=[noise(*shape)] * 2, block_table=torch.zeros(1, 1), **options)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (vllm_arguments(2, 2, 4, HEADS, DIM), "one axis of 2, for K and V"),
        (vllm_arguments(9, 3, 4, HEADS, DIM), "one axis of 2, for K and V"),
        (vllm_arguments(9, 2, HEADS, 4, DIM), r"\[2, N, 4, 3, 8\]"),
        (vllm_arguments(9, 2, 4, HEADS, DIM, head_dim_v=4), r"\[2, N, 4, 3, 8\]"),
        (vllm_arguments(9, 4, 2 * DIM), r"shape \(9, 4, 16\)"),
        (vllm_arguments(9, 2 * HEADS, 4, DIM), r"\[N, 3, 4, 16\], got shape \(9, 6, 4, 8\)"),
        (vllm_arguments(9, 2, 4, HEADS * DIM), r"\[N, 3, 4, 16\]"),
        (vllm_arguments(9, HEADS, 8, 2 * DIM), r"\[N, 3, 4, 16\]"),
        (
            vllm_arguments(9, HEADS, 4, DIM + 4, packing="halves", head_dim_v=4),
            "K and V of one size",
        ),
    ],
)
def test_vllm_refuses_what_it_does_not_know(arguments, match):
    with pytest.raises(adsc.UnsupportedError, match=f"kv_caches.*{match}"):
        layouts.from_vllm(**arguments)


def test_vllm_layers_must_be_alike():
    mixed = vllm_arguments(9, HEADS, 4, 2 * DIM)
    mixed["kv_caches"] = [mixed["kv_caches"][0], noise(2, 9, 4, HEADS, DIM)]
    with pytest.raises(adsc.UnsupportedError, match=r"kv_caches\[1\]"):
        layouts.from_vllm(**mixed)
    strided = vllm_arguments(9, HEADS, 4, 2 * DIM, packing="halves")
    strided["kv_caches"] = [noise(9, 4, HEADS, 2 * DIM).transpose(1, 2)]
    with pytest.raises(adsc.UnsupportedError, match="in one piece"):
        layouts.from_vllm(**strided)


def test_a_packed_cache_on_the_cpu_must_say_how():
    with pytest.raises(ValueError, match=r"packing: expected 'halves'.* got None"):
        layouts.from_vllm(**vllm_arguments(9, HEADS, 4, 2 * DIM, packing=None))
    with pytest.raises(ValueError, match=r"packing: .* got 'third'"):
        layouts.from_vllm(**vllm_arguments(9, HEADS, 4, 2 * DIM, packing="third"))
    on_device = vllm_arguments(9, HEADS, 4, 2 * DIM, packing=None)
    on_device["kv_caches"] = [x.to("meta") for x in on_device["kv_caches"]]
    assert layouts.from_vllm(**on_device).k_caches[0].shape == (9, HEADS, 4, DIM)


TABLE = torch.zeros(1, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: layouts.from_flashinfer([noise(9, 3, 4, HEADS, DIM)], TABLE, page_size=4),
            adsc.UnsupportedError,
            r"kv_caches\[0\]: expected \[pages, 2, ...\] in 5 dimensions",
        ),
        (
            lambda: layouts.from_flashinfer([noise(9, 2, HEADS, 4, DIM)], TABLE, page_size=4),
            adsc.UnsupportedError,
            "4 tokens on axis 1",
        ),
        (
            lambda: layouts.from_flashinfer(
                [(noise(9, 4, HEADS, DIM), noise(9, HEADS, DIM))], TABLE, page_size=4
            ),
            adsc.UnsupportedError,
            "4 tokens on axis 1",
        ),
        (
            lambda: layouts.from_flashinfer([], TABLE, page_size=4, kv_layout="NDH"),
            ValueError,
            "kv_layout: expected 'NHD' or 'HND', got 'NDH'",
        ),
        (
            lambda: layouts.from_tensorrt_llm(
                [noise(9, 1, HEADS, 4, DIM)], TABLE, tokens_per_block=4
            ),
            adsc.UnsupportedError,
            r"buffers\[0\]: expected \[pages, 2",
        ),
        (
            lambda: layouts.from_sglang([noise(9, HEADS, DIM)], [noise(9, HEADS)], TABLE),
            adsc.UnsupportedError,
            r"v_buffer\[0\]: expected \[slots, H, D\]",
        ),
        (
            lambda: layouts.from_sglang([noise(9, HEADS, DIM)], [], TABLE, page_size=4),
            adsc.UnsupportedError,
            r"k_buffer\[0\]: expected \[slots, H, D\], 4 slots to a page",
        ),
    ],
)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()


# ---- Scales of tokens ----


def octets(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def vllm_inline_scales(size: int):
    """K, its float32 scale, V, its own, of each head and token."""
    kv = octets(BLOCKS, HEADS, size, 2 * (DIM + 4))
    cache = layouts.from_vllm(
        [kv], TABLE, block_size=size, num_kv_heads=HEADS, head_dim=DIM, packing="content"
    )
    assert cache.k_scales is None
    return cache, lambda block, offset: [kv[block, :, offset]]


def flashinfer_nvfp4(layout: str):
    def make(size: int):
        inner = (size, HEADS) if layout == "NHD" else (HEADS, size)
        pair = (octets(BLOCKS, *inner, DIM), octets(BLOCKS, *inner, DIM))
        scales = (octets(BLOCKS, *inner, 2), octets(BLOCKS, *inner, 2))
        cache = layouts.from_flashinfer(
            [pair], TABLE, page_size=size, kv_layout=layout, kv_scales=[scales]
        )
        planes = [x if layout == "NHD" else x.transpose(1, 2) for x in (*pair, *scales)]
        return cache, lambda block, offset: [x[block, offset] for x in planes]

    return make


def sglang_fp4(size: int):
    k, v = octets(BLOCKS * size, HEADS, DIM), octets(BLOCKS * size, HEADS, DIM)
    scales = [octets(BLOCKS * size, HEADS * 2) for _ in range(2)]
    cache = layouts.from_sglang(
        [k], [v], TABLE, page_size=size, k_scale_buffer=scales[:1], v_scale_buffer=scales[1:]
    )
    return cache, lambda block, offset: [x[block * size + offset] for x in (k, v, *scales)]


@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    "make", [vllm_inline_scales, flashinfer_nvfp4("NHD"), flashinfer_nvfp4("HND"), sglang_fp4]
)
def test_scales_move_with_their_rows(make, size, step):
    cache, row = make(size)
    table = block_table(size)
    stage = adsc.make_plan(SCHEDULE, *LAYOUT).stages[1]

    def read(b: int, r: int) -> list[Tensor]:
        return [x.clone() for x in row(int(table[b, r // size]), r % size)]

    before = [[read(b, r) for r in range(n)] for b, n in enumerate(SEQ_LENS)]
    if step:
        hidden = torch.randn(stage.num_tokens_in, 4)
        adsc.ops.compress_step(hidden, replace(cache, block_table=table, seq_lens=SEQ_LENS), stage)
    else:
        cache = replace(cache, block_table=table)
        adsc.ops.compact_paged_kv_(cache, stage=stage, seq_lens=SEQ_LENS)
    for b, own in enumerate(survivors(stage)):
        for i, source in enumerate(own):
            assert all(map(torch.equal, read(b, i), before[b][source]))


SCALES = {
    "planes of another layout": [(octets(9, HEADS, 4), octets(9, 4, HEADS))],
    "of a whole tensor": [(octets(1), octets(1))],
}


@pytest.mark.parametrize("name", SCALES)
def test_scales_of_other_shapes(name):
    kv = [octets(9, 2, 4, HEADS, DIM)]
    with pytest.raises(adsc.UnsupportedError, match=r"^kv_scales\[0\]: "):
        layouts.from_flashinfer(kv, TABLE, page_size=4, kv_scales=SCALES[name])
    with pytest.raises(ValueError, match=r"^kv_scales: expected 1 layers"):
        layouts.from_flashinfer(kv, TABLE, page_size=4, kv_scales=[])
    cache = [octets(8, HEADS, DIM)]
    with pytest.raises(adsc.UnsupportedError, match=r"^k_scale_buffer\[0\]: "):
        layouts.from_sglang(cache, cache, TABLE, k_scale_buffer=[octets(8, HEADS + 1)])


# ---- transformers ----


def filled(cache):
    for n in range(LAYERS):
        for begin, end in ((0, 5), (5, 7)):
            shape = (2, HEADS, end - begin, DIM)
            cache.update(torch.randn(shape), torch.randn(shape), n, at(begin, end))
    return cache


def at(begin: int, end: int) -> dict[str, Tensor]:
    """What transformers 5.0 wants to be told; later versions count, and ignore it."""
    return {"cache_position": torch.arange(begin, end)}


def text_config(**options):
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        head_dim=DIM,
        hidden_size=HEADS * DIM,
        intermediate_size=16,
        vocab_size=50,
        **options,
    )


def dynamic_cache():
    from transformers import DynamicCache

    return filled(DynamicCache())


def static_cache():
    from transformers import StaticCache

    return filled(StaticCache(config=text_config(), max_cache_len=11))


@pytest.mark.parametrize("make", [dynamic_cache, static_cache])
def test_transformers_views_and_length(make):
    cache = make()
    views = layouts.from_transformers(cache)
    assert views.layout == "HND"
    for n, layer in enumerate(cache.layers):
        assert views.k_caches[n] is layer.keys
        assert views.v_caches[n] is layer.values
    keys = [layer.keys[:, :, :4].clone() for layer in cache.layers]
    assert int(cache.get_seq_length()) == 7
    layouts.crop_transformers(cache, [4, 4])
    for n, layer in enumerate(cache.layers):
        assert int(layer.get_seq_length()) == 4
        assert layer.keys.untyped_storage().data_ptr() == views.k_caches[n].data_ptr()
        new = torch.randn(2, HEADS, 1, DIM)
        k, _ = cache.update(new, new, n, at(4, 5))
        assert k[:, :, :5].equal(torch.cat([keys[n], new], 2))
    for bad in ([4, 5], [12, 12]):
        with pytest.raises(ValueError, match="seq_lens: expected"):
            layouts.crop_transformers(cache, bad)
    layouts.crop_transformers(cache, [5, 5])  # as long as it is
    assert int(cache.get_seq_length()) == 5


@pytest.mark.parametrize("static", [False, True])
def test_transformers_decodes_as_over_a_gathered_cache(static):
    from transformers import DynamicCache, LlamaForCausalLM, StaticCache

    torch.manual_seed(3)
    config = text_config(num_key_value_heads=1)
    model = LlamaForCausalLM(config).eval()
    prompt, span = torch.randint(50, (2, 21)), (4, 12)
    spans = [(b, *span) for b in range(2)]
    stage = adsc.make_plan(SCHEDULE, [0, 21, 42], spans).stages[1]
    keep = stage.keep_indices()[: stage.seq_lens[0]]
    assert stage.seq_lens == (13, 13)

    @torch.no_grad()
    def decode(cache, token: Tensor) -> list[list[int]]:
        tokens = []
        for position in range(21, 29):
            where = torch.full((2, 1), position)
            logits = model(token, **{CACHE: cache}, position_ids=where).logits
            token = logits[:, -1:].argmax(-1)
            tokens.append(token[:, 0].tolist())
        return tokens

    def prefilled(cache) -> tuple[object, Tensor]:
        with torch.no_grad():
            return cache, model(prompt, **{CACHE: cache}).logits[:, -1:].argmax(-1)

    gathered, token = prefilled(DynamicCache())
    whole = decode(prefilled(DynamicCache())[0], token)
    for layer in gathered.layers:
        layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
    expected = decode(gathered, token)
    assert expected != whole

    cache = StaticCache(config=config, max_cache_len=40) if static else DynamicCache()
    cache, _ = prefilled(cache)
    views = layouts.from_transformers(cache)
    result = adsc.ops.compact_kv_(views, stage=stage, seq_lens=(21, 21))
    layouts.crop_transformers(cache, result.seq_lens.host)
    assert int(cache.get_seq_length()) == 13
    assert decode(cache, token) == expected


def test_transformers_refusals():
    from transformers import DynamicCache, StaticCache

    with pytest.raises(TypeError, match="cache: expected a transformers Cache, got list"):
        layouts.from_transformers([])
    with pytest.raises(ValueError, match=r"cache.layers\[0\]: expected a layer with a prompt"):
        layouts.from_transformers(StaticCache(config=text_config(), max_cache_len=11))
    windows = text_config()
    windows.layer_types = ["full_attention", "sliding_attention"]
    windows.sliding_window = 4
    for cache in (
        filled(DynamicCache(config=windows)),
        filled(StaticCache(config=windows, max_cache_len=11)),
    ):
        with pytest.raises(adsc.UnsupportedError, match=r"cache.layers\[1\].*SlidingWindowLayer"):
            layouts.from_transformers(cache)


# ---- Tables ----


def test_csr_and_block_tables():
    table = torch.tensor([[7, 2, -1], [-1, -1, -1], [4, 9, 5]], dtype=torch.int32)
    counts = [2, 0, 3]
    indices, indptr = layouts.block_table_to_csr(table, counts)
    assert indices.dtype == indptr.dtype == torch.int32
    assert indices.tolist() == [7, 2, 4, 9, 5]
    assert indptr.tolist() == [0, 2, 2, 5]
    for given in ([0, 2, 2, 5], indptr):
        back = layouts.csr_to_block_table(indices, given)
        assert back.dtype == torch.int32
        assert back.equal(table)
    assert layouts.csr_to_block_table(indices[:0], [0]).shape == (0, 0)
    assert layouts.csr_to_block_table(indices[:0], [0, 0]).shape == (1, 0)
    empty = layouts.block_table_to_csr(table[:0], [])
    assert [x.tolist() for x in empty] == [[], [0]]
    for bad in ([], [1, 5], [0, 4], [0, 3, 2, 5]):
        with pytest.raises(ValueError, match="indptr: expected ints from 0 to the 5 indices"):
            layouts.csr_to_block_table(indices, bad)
    for bad in ([2, 0], [2, 0, 4], [2, -1, 3]):
        with pytest.raises(ValueError, match="num_blocks: expected 3 ints up to 3"):
            layouts.block_table_to_csr(table, bad)
    with pytest.raises(TypeError, match="indptr: expected host ints, got a tensor on meta"):
        layouts.csr_to_block_table(indices, indptr.to("meta"))


@pytest.mark.parametrize("page_size", [1, 4])
def test_req_to_token_and_back(page_size):
    """Rows of some requests, as SGLang fills them: slots of whole pages, zeros behind."""
    pages = [[5, 3], [9, 2, 7], []]
    lens = [2 * page_size, 3 * page_size - (page_size > 1), 0]
    req_to_token = torch.zeros(6, 4 * page_size, dtype=torch.int32)
    requests = [4, 1, 2]
    for request, own, n in zip(requests, pages, lens, strict=True):
        slots = [p * page_size + t for p in own for t in range(page_size)]
        req_to_token[request, :n] = torch.tensor(slots[:n])
    for given in (requests, torch.tensor(requests), torch.tensor(requests, dtype=torch.int32)):
        table = layouts.req_to_token_to_block_table(
            req_to_token, given, page_size=page_size, max_len=max(lens)
        )
        assert table.dtype == torch.int32
        assert [table[b, : len(own)].tolist() for b, own in enumerate(pages)] == pages
    assert table.shape == (3, 3)
    whole = layouts.req_to_token_to_block_table(req_to_token, requests, page_size=page_size)
    assert whole.shape == (3, 4)
    assert whole[:, :3].equal(table)
    if page_size == 1:
        indices, indptr = layouts.req_to_token_to_csr(req_to_token, requests, lens)
        assert indices.tolist() == [5, 3, 9, 2, 7]
        assert indptr.tolist() == [0, 2, 5, 5]

    edited = torch.tensor([[3, -1], [9, 7], [-1, -1]], dtype=torch.int32)
    before = req_to_token.clone()
    layouts.block_table_to_req_to_token_(req_to_token, requests, edited, page_size=page_size)
    for request, own in zip(requests, ([3], [9, 7], []), strict=True):
        slots = [p * page_size + t for p in own for t in range(page_size)]
        slots += [0] * (2 * page_size - len(slots))
        assert req_to_token[request, : 2 * page_size].tolist() == slots
    others = [r for r in range(6) if r not in requests]
    assert req_to_token[others].equal(before[others])
    assert req_to_token[:, 2 * page_size :].equal(before[:, 2 * page_size :])


def test_trtllm_offsets():
    """As its cache manager writes them: K's plane, then V's, of each page."""
    pages = torch.tensor([[4, 1, 5], [2, 0, 3]], dtype=torch.int32)
    offsets = torch.stack([2 * pages, 2 * pages + 1], 1)
    assert layouts.trtllm_offsets_to_block_table(offsets[:, 0]).equal(pages)
