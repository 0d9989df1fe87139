"""Decoding and prefill as graphs, on a CPU: recorded once, replayed over other contents.

Attention of prompts stands in for a varlen kernel: one op that reads cumulative lengths when it
runs. What Triton reads and writes by address on a GPU, ops of `replay` do.
"""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from llava_case import IMAGES, PROMPTS, SECOND, SECOND_IMAGES
from replay import Captures, by_address
from tiny_checkpoints import make_checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adsc_kernels import attention_backends, attention_calls, decode, graphs
from adsc_kernels.cache import KVCache, LayerRows, Phase, passes_of
from adsc_kernels.decode import DecodeState, bucket_of
from adsc_kernels.llava import Llava
from adsc_kernels.plan import make_plan
from adsc_kernels.sampling import Inbox
from adsc_kernels.schedule import CompressionSchedule

SCHEDULES = ["", "1:1/2,3:1/3", "0:2/3,1:1/2@linspace@renumber", "1:1/2x1/2@grid"]


@torch.library.custom_op("adsc_tests::varlen", mutates_args=())
def varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int) -> Tensor:
    out = torch.zeros_like(q)
    spans = zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True)
    for a, b, c, d in (map(int, span) for span in spans):
        if a == b:
            continue
        assert d - c <= longest
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        parts = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        made = torch.nn.functional.scaled_dot_product_attention(
            *parts, attn_mask=mask, enable_gqa=True
        )
        out[a:b] = made[0].transpose(0, 1)
    return out


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    """Graphs as on a GPU with flash-attn."""
    made = Captures()

    def run(q, k, v, stage, keys, scale):
        lengths = attention_calls.arguments(stage, keys)
        cu_q, cu_k, _, longest = lengths.values()
        return varlen(q, k.contiguous(), v.contiguous(), cu_q, cu_k, longest)

    anywhere = {"dtypes": None, "head_dims": None, "capability": None}
    kernel = attention_backends.Backend(run, lambda device: None, **anywhere)
    monkeypatch.setitem(attention_backends.BACKENDS, "flash_attn", kernel)
    by_address(monkeypatch)
    monkeypatch.setattr(graphs, "capturable", lambda device: True)
    monkeypatch.setattr(graphs, "capture", made)
    monkeypatch.setattr(Inbox, "late", True)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llava:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, seed=5, layers=4, kv_heads=2)
    return Llava.from_pretrained(folder, device="cpu")


def fresh(model: Llava, schedule: str) -> Llava:
    """Under a schedule, with no graphs yet."""
    twin = model.with_schedule(schedule)
    twin.graphs = graphs.Graphs()
    return twin


def turns(model: Llava, prompts=PROMPTS, images=IMAGES, second=SECOND, more=SECOND_IMAGES):
    first = model.generate(prompts, images, max_new_tokens=7)
    then = model.generate(second, more, max_new_tokens=6, conversation=first.conversation)
    return first.token_ids, then.token_ids


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tokens_equal_those_without_graphs(model, captures, schedule):
    plain = fresh(model, schedule)
    plain.graphs.enabled = False
    want = turns(plain)
    assert not captures.made
    got = turns(graphed := fresh(model, schedule))
    assert got == want
    # Of seven tokens six are steps: one as it is, one captured; all but the first are replayed.
    assert captures.replays >= 5 + 4
    assert len(graphed.graphs) >= 2


def test_the_stand_in_sees_what_the_host_counts(model, captures, monkeypatch):
    """Lengths that a graph takes from the host stay those of capture, and tokens go wrong."""
    want = turns(fresh(model, SCHEDULES[1]))

    def frozen(self, s, bounds):
        keys = real(self, s, bounds)
        starts = torch.tensor(keys.starts, dtype=torch.int32)
        ends = starts + torch.tensor(keys.lens, dtype=torch.int32)
        cu_k = bounds[s].clone()
        cu_k[1::2] = ends
        return decode.CachedKeys(keys.starts, keys.lens, keys.max_len, keys.cu_seqlens_q, cu_k)

    real = DecodeState._keys
    monkeypatch.setattr(DecodeState, "_keys", frozen)
    assert turns(fresh(model, SCHEDULES[1])) != want


def without(model: Llava, schedule: str) -> Llava:
    plain = fresh(model, schedule)
    plain.graphs.enabled = False
    return plain


def test_a_repeated_prompt_is_replayed_whole(model, captures):
    """Other pictures and words of the same layout, in a cache that lies elsewhere and has other
    room: the same graphs."""
    twin, plain = fresh(model, SCHEDULES[1]), without(model, SCHEDULES[1])
    other = ["w9 w8 <image> w7", *PROMPTS[1:]]
    kept = [twin.generate(PROMPTS, IMAGES, max_new_tokens=3) for _ in range(2)]
    made, replays = len(captures.made), captures.replays
    images = [IMAGES[3][:1], *IMAGES[1:]]
    got = twin.generate(other, images, max_new_tokens=4)
    assert len(captures.made) == made == 2  # of the prompts and of a step
    assert captures.replays == replays + 4
    assert got.token_ids == plain.generate(other, images, max_new_tokens=4).token_ids
    caches = [answer.conversation.cache for answer in (*kept, got)]
    assert len({rows.k.data_ptr() for cache in caches for rows in cache.layers}) == 3 * 4
    # What the others hold was left alone.
    first = plain.generate(PROMPTS, IMAGES, max_new_tokens=3)
    then = [
        twin.generate(SECOND, SECOND_IMAGES, max_new_tokens=3, conversation=answer.conversation)
        for answer in (kept[0], first)
    ]
    assert then[0].token_ids == then[1].token_ids


def test_the_stand_in_sees_an_address_of_capture(model, captures, monkeypatch):
    """A graph that goes on writing and reading where the cache lay at capture: wrong tokens."""

    def stuck(self: KVCache, addresses: Tensor) -> list[LayerRows]:
        return at(self, self.addresses())

    at = KVCache.at
    calls = (IMAGES, IMAGES, [IMAGES[3][:1], *IMAGES[1:]])
    plain = without(model, SCHEDULES[1])
    want = [plain.generate(PROMPTS, images, max_new_tokens=4).token_ids for images in calls]
    monkeypatch.setattr(KVCache, "at", stuck)
    twin = fresh(model, SCHEDULES[1])
    kept = [twin.generate(PROMPTS, images, max_new_tokens=4) for images in calls]
    assert kept[0].token_ids == want[0]
    assert kept[2].token_ids != want[2]


def test_another_layout_is_another_graph(model, captures):
    """Of the same rows in all: nothing is replayed that was captured of other spans."""
    twin, plain = fresh(model, "1:1/2"), without(model, "1:1/2")
    prompts = ("w1 w2 <image> w3", "w1 <image> w2 w3", "<image> w1 w2 w3")
    want = [plain.generate([prompt], IMAGES[:1], max_new_tokens=2).token_ids for prompt in prompts]
    for prompt, ids in zip(prompts * 3, want * 3, strict=True):
        assert twin.generate([prompt], IMAGES[:1], max_new_tokens=2).token_ids == ids
    assert len(captures.made) == 3 + 1  # a step is the same behind all of them


def test_a_cache_of_another_form_runs_as_it_is(model, captures):
    """Its addresses would be read as rows of this model's."""
    twin = fresh(model, "1:1/2")
    for cache in (
        KVCache(twin.schedule, 1, 2, twin.config.head_dim, torch.float64, "cpu"),
        KVCache(CompressionSchedule.parse("2:1/2", 4), 1, 2, 8, torch.float32, "cpu"),
    ):
        assert not twin._graphed("prefill", cache)
        assert not twin._graphed("decode", cache)
    assert twin._graphed("decode", twin.new_cache(3))


# ---- Batches of a bucket -----------------------------------------------------------------------


def test_batches_of_a_bucket_share_a_graph(model, captures):
    """Of 5 to 8, and no others; each answer is what it is without."""
    twin, plain = fresh(model, SCHEDULES[1]), without(model, SCHEDULES[1])
    for size in (5, 8, 6, 7, 3, 1, 4, 1):
        prompts, images = (PROMPTS * 2)[:size], (IMAGES * 2)[:size]
        want = plain.generate(prompts, images, max_new_tokens=4, temperature=2.0, seed=3)
        got = twin.generate(prompts, images, max_new_tokens=4, temperature=2.0, seed=3)
        assert got.token_ids == want.token_ids
    steps = [made for made in captures.made if made.inputs[0].dtype is torch.int64]
    assert [len(made.inputs[0]) for made in steps] == [8, 4, 1]


def test_padding_writes_nowhere(model, captures):
    """Three sequences as four: every row of the cache that isn't theirs to write stays."""
    twin = fresh(model, SCHEDULES[1])
    cache = twin.new_cache(3)
    lens, room = (4, 7, 1), 6
    for stage in cache.stages:
        stage.fit([n + room for n in lens])
        stage.lens = lens
    for rows in cache.layers:
        rows.k.fill_(0.5), rows.v.fill_(0.25)
    with torch.no_grad():
        state = twin.begin_decode(cache, lens, 5)
        assert state.padded == 4
        for _ in range(5):
            logits = twin.decode(torch.tensor([5, 6, 7]), state)
            assert logits.shape == (3, twin.config.vocab_size)
            assert logits.isfinite().all()
    assert captures.replays == 4
    starts = (0, 10, 23)
    mine = torch.zeros(30, dtype=torch.bool)
    for start, n in zip(starts, lens, strict=True):
        mine[start + n : start + n + 5] = True
    for rows in cache.layers:
        for held, before in ((rows.k, 0.5), (rows.v, 0.25)):
            assert ((held != before).flatten(1).any(1) == mine).all()


def test_buckets():
    sizes = [1, 2, 3, 4, 5, 8, 9, 13, 16, 17, 24, 25, 504, 505, 512, 513]
    want = [1, 2, 4, 4, 8, 8, 16, 16, 16, 24, 24, 32, 504, 512, 512, None]
    assert [bucket_of(size) for size in sizes] == want


def test_a_batch_past_the_largest_bucket(model, captures, monkeypatch):
    """Said, and run as without graphs."""
    twin, plain = fresh(model, ""), without(model, "")
    want = plain.generate(PROMPTS, IMAGES, max_new_tokens=4).token_ids
    monkeypatch.setattr(decode, "LARGEST_BUCKET", 3)
    monkeypatch.setattr("adsc_kernels.llava.model.LARGEST_BUCKET", 3)
    with pytest.warns(UserWarning, match="at most 3 sequences, this has 4: it runs without"):
        assert twin.generate(PROMPTS, IMAGES, max_new_tokens=4).token_ids == want
    assert captures.replays == 0


class Reads(TorchDispatchMode):
    """What is read by ops that was not made by them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.read: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = {id(x) for x in self.made}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.read += [weakref.ref(x) for x in given if id(x) not in made]
        out = op(*args, **(kwargs or {}))
        self.made += [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        return out


def test_a_graph_keeps_its_tables_and_no_cache(model, captures, monkeypatch):
    """What it reads by address lives as long; but a cache's memory is given back when it goes."""
    reads = Reads()

    def capture(run, inputs):
        copies = tuple(x.clone() for x in inputs)
        with reads:
            output = run(*copies)
        reads.made.clear()
        return graphs.Graph(copies, output, lambda: None)

    monkeypatch.setattr(graphs, "capture", capture)
    twin = fresh(model, SCHEDULES[1])
    for _ in range(2):
        answer = twin.generate(PROMPTS, IMAGES, max_new_tokens=4)
    assert len(twin.graphs) == 2
    rows = {weakref.ref(x) for layer in answer.conversation.cache.layers for x in layer[:2]}
    assert len(rows) == 2 * 4
    assert not rows & set(reads.read)  # but by address
    del answer
    gc.collect()
    assert all(ref() is not None for ref in reads.read)
    assert all(ref() is None for ref in rows)


def test_a_capture_that_fails(model, captures, monkeypatch):
    """Said once; then as without graphs."""

    def capture(run, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    twin = fresh(model, SCHEDULES[1])
    twin.graphs.enabled = False
    want = turns(twin)
    twin.graphs.enabled = True
    monkeypatch.setattr(graphs, "capture", capture)
    with pytest.warns(UserWarning, match="graphs are off.*not permitted"):
        assert turns(twin) == want
    assert len(twin.graphs) == 0


def test_callers_share_no_graph(captures):
    """Two threads would write over each other's inputs."""
    kept = graphs.Graphs()
    for _ in range(2):
        kept(1, lambda x: x + 1, torch.ones(1))
    with ThreadPoolExecutor(1) as other:
        assert other.submit(kept, 1, lambda x: x + 2, torch.ones(1)).result() == 3
    assert kept(1, lambda x: x + 3, torch.ones(1)) == 2  # replayed
    with torch.inference_mode():
        assert kept(1, lambda x: x + 4, torch.ones(1)) == 5


def test_an_output_is_the_callers_own(captures):
    kept = graphs.Graphs()
    outs = [kept(1, lambda x: x + 1, torch.full((1,), float(n))) for n in range(4)]
    assert [float(out) for out in outs] == [1, 2, 3, 4]


def test_graphs_are_bounded():
    kept = graphs.Graphs(most=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "capturable", lambda device: True)
        patch.setattr(graphs, "capture", Captures())
        for key in (1, 2, 1, 2, 3, 1, 3, 1):
            assert kept(key, lambda x: x + 1, torch.full((1,), float(key))) == key + 1
            assert len(kept._known) <= 2
        assert len(kept) == 2
    assert kept(1, lambda x: x + 2, torch.ones(1)) == 3  # on a CPU there are none
    with pytest.raises(ValueError, match="most"):
        graphs.Graphs(most=0)


# ---- The state ---------------------------------------------------------------------------------


def cache_of(schedule: str, lens: tuple[int, ...], room: int) -> KVCache:
    cache = KVCache(CompressionSchedule.parse(schedule, 3), len(lens), 1, 4, torch.float32, "cpu")
    for stage in cache.stages:
        stage.fit([n + room for n in lens])
        stage.lens = lens
    return cache


def test_a_cache_without_room():
    cache = cache_of("1:1/2", (4, 2), room=2)
    with pytest.raises(ValueError, match="cache: expected room"):
        DecodeState(cache, [4, 2], 3)
    with pytest.raises(ValueError, match="cached: expected 2 sequences, got 1"):
        DecodeState(cache, [4], 1)
    with pytest.raises(TypeError, match="cache: "):
        DecodeState(None, [4, 2], 1)
    state = DecodeState(cache, [4, 2], 1)
    state.advance()
    with pytest.raises(ValueError, match="steps: expected at most 1"):
        state.advance()


def test_what_a_state_says_is_what_a_plan_says():
    """At every step: rows, positions and lengths of a plan made for it."""
    for positions in ("original", "renumber"):
        schedule = CompressionSchedule.parse(f"1:1/3@{positions}", num_layers=3)
        layout = ([0, 12, 20], [(0, 1, 7), (1, 0, 6)])
        cache = KVCache(schedule, 2, 1, 4, torch.float32, "cpu")
        whole = make_plan(schedule, *layout)
        cache.fit(whole, extra=3)
        cache.advance(whole)
        state = DecodeState(cache, [12, 8], 3)
        for step in range(3):
            bounds = ([0, 12 + step + 1, 20 + 2 * step + 2], layout[1])
            chunks = [(12 + step, 13 + step), (8 + step, 9 + step)]
            plan = make_plan(schedule, *bounds, chunks=chunks)
            want = passes_of(plan, cache, Phase.DECODE)
            got = state.passes(state.counters, state.bounds)
            for mine, truth in zip(got, want, strict=True):
                assert mine.positions.tolist() == truth.positions.tolist()
                assert mine.slots.tolist() == truth.slots.tolist()
                assert mine.keys.lens == truth.keys.lens
                assert mine.keys.starts == truth.keys.starts
                for name in ("cu_seqlens_q", "cu_seqlens_k"):
                    one, other = (getattr(p.keys, name) for p in (mine, truth))
                    assert one.tolist() == other.tolist()
                assert mine.rows.cu_seqlens.tolist() == truth.rows.cu_seqlens.tolist()
                assert mine.rows.segments.tolist() == truth.rows.segments.tolist()
            state.advance()
            cache.advance(plan)
