"""Shrinking the thin LLaVA's cache after the fact: what later tokens see, and the memory it gives.

The oracle runs every conversation anew and whole, without a cache: in its layers a token is hidden
from those that came after its K and V were compacted away.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from llava_case import IMAGES, PROMPTS, SECOND, SECOND_IMAGES, relative_error, shares
from llava_oracle import kept, oracle
from tiny_checkpoints import make_checkpoint

from adsc_kernels.cache import Phase
from adsc_kernels.llava import Llava
from adsc_kernels.llava.generate import run

GRID = 5
SCHEDULES = ["1:1/2,3:1/3", "2:1/6@center", "1:1/2x2/3,3:1/2x1/2@grid@renumber"]
WITHOUT_EARLY_LAYERS = ["", "0:2/3,1:1/2,4:0@linspace@renumber"]
BOTH = [a + b for a, b in zip(IMAGES, SECOND_IMAGES, strict=True)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    hf = make_checkpoint(folder, seed=6, layers=5, kv_heads=2, grid=GRID)
    return hf, Llava.from_pretrained(folder, device="cpu")


def images_of(talk, sequence: int) -> list[tuple[int, int, int]]:
    spans = sorted(span for span in talk.vision_spans if span[0] == sequence)
    return [(start, h, w) for _, start, _, h, w in spans]


def asked(hf, model, talk, images, sequence: int, lost=None):
    """The oracle's logits and surviving tokens of one conversation."""
    given = images[sequence]
    return oracle(
        hf,
        talk.tokens[sequence],
        images_of(talk, sequence),
        model.processor.pixels(given) if given else None,
        shares(model),
        model.schedule.pattern,
        model.schedule.positions,
        lost,
    )


def lost_early(model, stages, ends: list[int]) -> dict[int, dict[int, int]]:
    """What the first boundary drops of a turn, hidden in the layers before it from its end on."""
    gone = {t: min(e for e in ends if e > t) for t in set(stages[0]) - set(stages[1])}
    return {n: dict(gone) for n in model.schedule.layers_of_stage(0)}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("chunk", [None, 7])
def test_generated_tokens_follow_the_oracle(pair, schedule, chunk):
    hf, base = pair
    model = base.with_schedule(schedule)
    options = dict(max_new_tokens=6, prefill_chunk=chunk, compact_early_layers=True)
    first = model.generate(PROMPTS, IMAGES, **options)
    ends = [
        [len(tokens) - len(ids)]
        for tokens, ids in zip(first.conversation.tokens, first.token_ids, strict=True)
    ]
    second = model.generate(SECOND, SECOND_IMAGES, conversation=first.conversation, **options)
    talk = second.conversation
    changes = []
    for b, (tokens, ids) in enumerate(zip(talk.tokens, second.token_ids, strict=True)):
        ends[b].append(len(tokens) - len(ids))
        plain, stages = asked(hf, model, talk, BOTH, b)
        logits, _ = asked(hf, model, talk, BOTH, b, lost_early(model, stages, ends[b]))
        for end, answer in zip(ends[b], (first.token_ids[b], ids), strict=True):
            rows = logits[stages[-1].index(end - 1) :][: len(answer)]  # text: all of it stays
            assert rows.argmax(-1).tolist() == answer
        changes.append(relative_error(logits[-len(ids) :], plain[-len(ids) :]))
    assert sum(change > 1e-3 for change in changes) >= 3  # all but a conversation without pictures


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_decoding_equals_decoding_over_a_gathered_cache(pair, schedule):
    hf, base = pair
    model = base.with_schedule(schedule)
    want = model.generate(PROMPTS, IMAGES, max_new_tokens=6, compact_early_layers=True)

    answer = model.generate(PROMPTS, IMAGES, max_new_tokens=1)
    talk, cache = answer.conversation, answer.conversation.cache.stages[0]
    keep, first = [], 0
    for b, prompt in enumerate(talk.cached):
        stages = asked(hf, model, talk, IMAGES, b)[1]
        alive = [t for t in stages[1] if t < prompt]
        keep += [first + t for t in alive]
        cache.gone[b] = torch.tensor([t for t in range(prompt) if t not in alive]).long().numpy()
        first += prompt
    cache.k = [k[keep] for k in cache.k]
    cache.v = [v[keep] for v in cache.v]
    cache.lens = cache.capacities = cache.left(cache.lens)
    assert cache.allocated_bytes == want.cache_bytes_per_stage[0]

    tokens = [ids[-1:] for ids in answer.token_ids]
    with torch.no_grad():
        for _ in range(5):
            for stage in talk.cache.stages:
                stage.fit([n + 1 for n in stage.lens])
            hidden = run(model, talk, [n + 1 for n in talk.cached], Phase.DECODE)
            for b, token in enumerate(model.logits(hidden).argmax(-1).tolist()):
                talk.tokens[b].append(token)
                tokens[b].append(token)
    assert tokens == want.token_ids
    for got, expected in zip(talk.cache.stages, want.conversation.cache.stages, strict=True):
        for one, other in zip((*got.k, *got.v), (*expected.k, *expected.v), strict=True):
            assert one.equal(other)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_early_layers_take_what_the_first_boundary_leaves(pair, schedule):
    model = pair[1].with_schedule(schedule)
    plain = model.generate(PROMPTS, IMAGES, max_new_tokens=3)
    small = model.generate(PROMPTS, IMAGES, max_new_tokens=3, compact_early_layers=True)
    assert small.cache_bytes_per_stage[1:] == plain.cache_bytes_per_stage[1:]
    row_bytes = 2 * model.config.num_kv_heads * model.config.head_dim * 4
    rows = len(model.schedule.layers_of_stage(0)) * row_bytes
    assert plain.cache_bytes_per_stage[0] == plain.plan.stages[0].num_tokens * rows
    assert small.cache_bytes_per_stage[0] == plain.plan.stages[1].num_tokens * rows
    stage = small.conversation.cache.stages[0]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*stage.k, *stage.v)}
    assert sum(s.nbytes() for s in storages.values()) == stage.allocated_bytes
    assert stage.allocated_bytes == (plain.plan.stages[1].num_tokens + 2 * len(PROMPTS)) * rows


@pytest.mark.parametrize("schedule", WITHOUT_EARLY_LAYERS)
def test_nothing_to_do_without_early_layers(pair, schedule):
    model = pair[1].with_schedule(schedule)
    plain = model.generate(PROMPTS, IMAGES, max_new_tokens=4)
    same = model.generate(PROMPTS, IMAGES, max_new_tokens=4, compact_early_layers=True)
    assert same.token_ids == plain.token_ids
    assert same.cache_bytes_per_stage == plain.cache_bytes_per_stage


@pytest.mark.parametrize(
    ("schedule", "early"),
    [(text, False) for text in WITHOUT_EARLY_LAYERS] + [(text, True) for text in SCHEDULES],
)
def test_older_pictures_shrink_in_every_layer(pair, schedule, early):
    """Once between two turns, and once more behind the second; then a third turn of text."""
    hf, base = pair
    model = base.with_schedule(schedule)
    options = dict(max_new_tokens=4, compact_early_layers=early)
    turns = [model.generate(PROMPTS, IMAGES, **options)]
    talk = turns[0].conversation
    size = len(talk.tokens)
    ends = [[len(t) - 4] for t in talk.tokens]
    shrunk = []  # of each call: the tokens cached by then, pictures, share
    images, calls = IMAGES, ((1, "1/2", SECOND, SECOND_IMAGES), (1, "1/3", ["w9 w8"] * size, None))
    for older_than, keep, prompts, pictures in calls:
        shrunk.append((list(talk.cached), list(talk.vision_spans), older_than, keep))
        before = talk.cache.bytes_per_stage
        talk.compact_images(older_than, keep)
        after = talk.cache.bytes_per_stage
        assert after[0] < before[0] or not talk.cache.stages[0].layers
        assert all(a <= b for a, b in zip(after, before, strict=True))
        assert all(stage.capacities == stage.lens for stage in talk.cache.stages)
        turns.append(model.generate(prompts, pictures, conversation=talk, **options))
        for b, tokens in enumerate(talk.tokens):
            ends[b].append(len(tokens) - 4)
        images = BOTH
    talk = turns[-1].conversation
    for b in range(size):
        plain, stages = asked(hf, model, talk, images, b)
        lost = lost_early(model, stages, ends[b]) if early and len(stages) > 1 else {}
        for n in range(model.schedule.num_layers):
            alive = stages[model.schedule.stage_of_layer(n)]
            hidden = lost.setdefault(n, {})
            for cached, spans, older_than, keep in shrunk:
                mine = sorted(span for span in spans if span[0] == b)
                for _, start, length, *_ in mine[: max(len(mine) - older_than, 0)]:
                    left = [t for t in alive if start <= t < start + length and t not in hidden]
                    stay = {left[i] for i in kept("start", len(left), Fraction(keep))}
                    hidden |= {t: cached[b] for t in left if t not in stay}
        logits, _ = asked(hf, model, talk, images, b, lost)
        for end, turn in zip(ends[b], turns, strict=True):
            rows = logits[stages[-1].index(end - 1) :][:4]
            assert rows.argmax(-1).tolist() == turn.token_ids[b]
        for n in range(model.schedule.num_layers):
            stage = talk.cache.stages[model.schedule.stage_of_layer(n)]
            alive = stages[model.schedule.stage_of_layer(n)]
            rows = [t for t in alive if t < talk.cached[b] and t not in lost[n]]
            assert stage.lens[b] == len(rows)
        if len(images_of(talk, b)) > 1:
            assert relative_error(logits[-4:], plain[-4:]) > 1e-3


def test_bad_input_changes_nothing(pair):
    model = pair[1].with_schedule(SCHEDULES[0])
    talk = model.generate(PROMPTS, IMAGES, max_new_tokens=2).conversation
    before = talk.cache.bytes_per_stage
    with pytest.raises(ValueError, match="older_than: expected at least 0, got -1"):
        talk.compact_images(-1)
    with pytest.raises(ValueError, match=r"a keep share in \[0, 1\]"):
        talk.compact_images(0, "3/2")
    assert talk.cache.bytes_per_stage == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_allocator_agrees(tmp_path):
    make_checkpoint(tmp_path, seed=6, layers=4, grid=12)
    model = Llava.from_pretrained(tmp_path, "3:1/4", device="cuda")
    talk = model.generate(PROMPTS * 8, IMAGES * 8, max_new_tokens=2).conversation
    torch.cuda.synchronize()
    before, told = torch.cuda.memory_allocated(), sum(talk.cache.bytes_per_stage)
    talk.compact_images(0, "1/8")
    freed = before - torch.cuda.memory_allocated()
    tensors = 2 * model.schedule.num_layers
    assert abs(freed - (told - sum(talk.cache.bytes_per_stage))) <= 512 * tensors
