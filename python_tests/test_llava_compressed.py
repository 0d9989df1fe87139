"""Under compression the thin LLaVA is the slow oracle, however its prompts are cut and batched."""

from __future__ import annotations

import pytest
import torch
from llava_case import (
    IMAGES,
    PROMPTS,
    SECOND,
    SECOND_IMAGES,
    begin,
    expected,
    relative_error,
    run_to,
    run_whole,
    shares,
)
from tiny_checkpoints import make_checkpoint

from adsc_kernels.cache import Phase
from adsc_kernels.llava import Llava

GRID = 5  # odd, so that no share divides it
SCHEDULES = [
    *(
        f"{text}@{pattern}@{positions}"
        for text in ("1:1/2,3:1/3", "0:1/4", "0:2/3,1:1/2,4:0")
        for pattern in ("start", "center", "linspace")
        for positions in ("original", "renumber")
    ),
    "1:1/2x2/3,3:1/2x1/2@grid",
    "0:1x1/2,2:1/3x1@grid@renumber",
]
FEW = ["1:1/2,3:1/3", "0:2/3,1:1/2,4:0@linspace@renumber", "1:1/2x2/3,3:1/2x1/2@grid@renumber"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    hf = make_checkpoint(folder, seed=5, layers=5, kv_heads=2, grid=GRID)
    return hf, Llava.from_pretrained(folder, device="cpu")


def close(got: list[torch.Tensor], want: list[torch.Tensor], limit: float = 1e-4) -> None:
    for one, other in zip(got, want, strict=True):
        assert relative_error(one, other) < limit


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logits_equal_the_oracle(pair, schedule):
    hf, base = pair
    model = base.with_schedule(schedule)
    talk, _ = begin(model)
    close(run_whole(model), expected(hf, model, talk, IMAGES, shares(model)))


def test_the_oracle_tells_schedules_apart(pair):
    """Positions, pattern and share all show in the logits: equality means something."""
    _, base = pair
    texts = ["2:2/5", "2:2/5@center", "2:2/5@linspace", "2:2/5@renumber", "2:2/3", "3:2/5"]
    last = [run_whole(base.with_schedule(text))[1][-1] for text in texts]
    for i, one in enumerate(last):
        for other in last[:i]:
            assert relative_error(one, other) > 1e-3


@pytest.mark.parametrize("schedule", FEW)
@pytest.mark.parametrize("size", [1, 7, 30])
def test_prefill_in_chunks_is_prefill_whole(pair, schedule, size):
    model = pair[1].with_schedule(schedule)
    want = run_whole(model)
    talk, pictures = begin(model)
    longest = max(len(tokens) for tokens in talk.tokens)
    got: list[list[torch.Tensor]] = [[] for _ in PROMPTS]
    for end in range(size, longest + size, size):
        ends = [min(end, len(tokens)) for tokens in talk.tokens]
        for rows, new in zip(
            got, run_to(model, talk, ends, Phase.CHUNKED_PREFILL, pictures), strict=True
        ):
            rows.append(new)
    close([torch.cat(rows) for rows in got], want, 1e-5)


@pytest.mark.parametrize("schedule", FEW)
def test_generate_in_chunks_is_generate_whole(pair, schedule):
    model = pair[1].with_schedule(schedule)
    want = model.generate(PROMPTS, IMAGES, max_new_tokens=4)
    for size in (1, 9):
        got = model.generate(PROMPTS, IMAGES, max_new_tokens=4, prefill_chunk=size)
        assert got.token_ids == want.token_ids
        assert got.cache_bytes_per_stage == want.cache_bytes_per_stage


@pytest.mark.parametrize("schedule", FEW)
def test_a_sequence_alone_is_the_same_in_a_batch(pair, schedule):
    model = pair[1].with_schedule(schedule)
    batch = run_whole(model)
    answers = model.generate(PROMPTS, IMAGES, max_new_tokens=6).token_ids
    for b, (prompt, images) in enumerate(zip(PROMPTS, IMAGES, strict=True)):
        close(run_whole(model, [prompt], [images]), [batch[b]], 1e-5)
        assert model.generate([prompt], [images], max_new_tokens=6).token_ids == [answers[b]]


@pytest.mark.parametrize("schedule", FEW)
def test_generated_tokens_follow_the_oracle(pair, schedule):
    """Each token is the likeliest after all before it, run anew and whole."""
    hf, base = pair
    model = base.with_schedule(schedule)
    answer = model.generate(PROMPTS, IMAGES, max_new_tokens=6)
    talk = answer.conversation
    assert len({tuple(ids) for ids in answer.token_ids}) == len(PROMPTS)
    for logits, tokens, ids in zip(
        expected(hf, model, talk, IMAGES, shares(model)), talk.tokens, answer.token_ids, strict=True
    ):
        assert tokens[-len(ids) :] == ids
        assert logits[-len(ids) - 1 : -1].argmax(-1).tolist() == ids


@pytest.mark.parametrize("schedule", FEW)
@pytest.mark.parametrize("chunk", [None, 8])
def test_a_second_turn_is_the_whole_conversation_at_once(pair, schedule, chunk):
    hf, base = pair
    model = base.with_schedule(schedule)
    first = model.generate(PROMPTS, IMAGES, max_new_tokens=5)
    second = model.generate(
        SECOND,
        SECOND_IMAGES,
        max_new_tokens=5,
        prefill_chunk=chunk,
        conversation=first.conversation,
    )
    talk = second.conversation
    images = [a + b for a, b in zip(IMAGES, SECOND_IMAGES, strict=True)]
    spans = [span for b in range(len(PROMPTS)) for span in talk.vision_spans if span[0] == b]
    assert len(spans) == sum(map(len, images))
    for logits, ids in zip(
        expected(hf, model, talk, images, shares(model)), second.token_ids, strict=True
    ):
        assert logits[-len(ids) - 1 : -1].argmax(-1).tolist() == ids


@pytest.mark.parametrize("schedule", FEW)
def test_logits_of_a_second_turn(pair, schedule):
    hf, base = pair
    model = base.with_schedule(schedule)
    talk = model.generate(PROMPTS, IMAGES, max_new_tokens=3).conversation
    talk, pictures = begin(model, SECOND, SECOND_IMAGES, talk)
    ends = [len(tokens) for tokens in talk.tokens]
    got = run_to(model, talk, ends, Phase.LATER_TURN, pictures)
    images = [a + b for a, b in zip(IMAGES, SECOND_IMAGES, strict=True)]
    want = expected(hf, model, talk, images, shares(model))
    close(got, [rows[-len(new) :] for rows, new in zip(want, got, strict=True)])


@pytest.mark.parametrize("schedule", ["", *FEW])
def test_cache_bytes_are_what_the_stages_need(pair, schedule):
    """K and V of every layer, of the rows that the oracle leaves, and not a byte more."""
    from llava_oracle import oracle

    hf, base = pair
    model = base.with_schedule(schedule)
    answer = model.generate(PROMPTS, IMAGES, max_new_tokens=3)
    talk, _ = begin(model)
    rows = [0] * model.schedule.num_stages
    for b, tokens in enumerate(talk.tokens):
        spans = [(start, h, w) for c, start, _, h, w in talk.vision_spans if c == b]
        pixels = model.processor.pixels(IMAGES[b])
        stages = oracle(hf, tokens, spans, pixels, shares(model), model.schedule.pattern)[1]
        rows = [n + len(alive) for n, alive in zip(rows, stages, strict=True)]
    row_bytes = 2 * model.config.num_kv_heads * model.config.head_dim * 4
    layers = [len(model.schedule.layers_of_stage(s)) for s in range(len(rows))]
    want = tuple(n * depth * row_bytes for n, depth in zip(rows, layers, strict=True))
    assert answer.cache_bytes_per_stage == want
    assert answer.cache_bytes == sum(want)
    grown = [(n + 2 * len(PROMPTS)) * d * row_bytes for n, d in zip(rows, layers, strict=True)]
    assert list(answer.conversation.cache.bytes_per_stage) == grown
