"""Greedy tokens and log-probabilities equal the oracle's, however the engine is configured."""

from __future__ import annotations

from collections import defaultdict
from operator import mul

import pytest
from engines import (
    BLOCK,
    MIXED,
    SHARING,
    Ask,
    answer,
    assert_pool_free,
    check,
    engine,
    run,
    scheduler_of,
    words,
)


@pytest.mark.parametrize(
    "schedule",
    [
        "2:1/3,4:1/2",
        "0:1/4",  # no layer before the first boundary
        "3:0",  # all vision tokens dropped
        "2:1/2,3:1/3,5:1/2@center",
        "2:1/2@linspace@renumber",
        "2:1/2x1/4,4:1/2x1@grid",
    ],
)
def test_mixed_batch(llava, schedule):
    run(llava, schedule)


@pytest.mark.parametrize("budget", [33, 70])
def test_chunked_prefill(llava, budget):
    """Chunks that cut images, and (1/64 of 64 tokens) chunks without any survivor."""
    run(llava, "2:1/64,4:1", max_num_batched_tokens=budget, max_num_seqs=4)


def test_bigger_blocks(llava):
    run(llava, "2:1/3,4:1/2", block_size=128)


def test_prefix_caching(llava):
    """Hits before, in and behind images; another image or another question behind it."""
    schedule = "2:1/2,4:1/2"  # 64 -> 32 -> 16: drops of 32 and 48 tokens
    with engine(llava, schedule, enable_prefix_caching=True) as llm:
        for ask in (*SHARING, *SHARING):
            check(llava, schedule, [ask], answer(llm, [ask], 3))
        assert_pool_free(llm)


def hit(llm, ask: Ask) -> int:
    return answer(llm, [ask], 2)[0].num_cached_tokens


def test_where_prefix_hits_end(llava):
    """48 of 64 dropped is no multiple of 32: no hit behind an image; 32 of 64 is."""
    before, behind = f"{words(5, 70)}", words(9, 100)
    image = Ask(f"{before} <image> {behind}", (2,))
    other = Ask(f"{before} <image> {behind}", (3,))
    text = Ask(f"{words(5, 170)}")
    expected = {"2:1/2": (224, 64), "2:1/4": (64, 64), "": (224, 64)}
    for schedule, (same_image, other_image) in expected.items():
        with engine(llava, schedule, enable_prefix_caching=True) as llm:
            assert hit(llm, image) == 0
            assert hit(llm, image) == same_image, schedule
            assert hit(llm, other) == other_image, schedule
            assert hit(llm, text) == 64
            assert hit(llm, text) == 160
    aligned = {"adsc_align": "block"}
    with engine(llava, "2:1/4", enable_prefix_caching=True, additional_config=aligned) as llm:
        assert hit(llm, image) == 0
        assert hit(llm, image) == 224


def test_preemption(llava):
    """A pool too small for all requests at once."""
    schedule = "2:1/3,4:1/2"
    asks = [Ask(f"w{n} <image> {words(n, 12)}", (n,)) for n in range(6)]
    for caching in (False, True):
        options = dict(max_model_len=160, max_num_seqs=6, max_num_batched_tokens=160)
        with engine(
            llava, schedule, num_gpu_blocks_override=20, enable_prefix_caching=caching, **options
        ) as llm:
            preempted = count_preemptions(llm)
            check(llava, schedule, asks, answer(llm, asks, 40))
            assert preempted
            assert_pool_free(llm)


def count_preemptions(llm) -> list[str]:
    """Filled as requests are preempted."""
    scheduler, names = scheduler_of(llm), []
    preempt = scheduler._preempt_request

    def counted(request, *args, **kwargs):
        names.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = counted
    return names


def test_async_scheduler(llava):
    name = "adsc_kernels.integrations.vllm.scheduler.AdscAsyncScheduler"
    run(llava, "2:1/3,4:1/2", scheduler_cls=name, enable_prefix_caching=True)


def blocks_held(llm) -> dict[str, list[tuple[int, ...]]]:
    """Filled with the blocks that each request, by its number, held in each group after a step."""
    manager, held = scheduler_of(llm).kv_cache_manager, defaultdict(list)
    allocate = manager.allocate_slots

    def watched(request, *args, **kwargs):
        blocks = allocate(request, *args, **kwargs)
        number = request.request_id.split("-")[0]
        held[number].append(tuple(map(len, manager.get_block_ids(request.request_id))))
        return blocks

    manager.allocate_slots = watched
    return held


def test_blocks_of_each_group(llava):
    """Each stage's group holds blocks for its own survivors, and no more."""
    schedule, ask = "2:1/4,4:1/2", MIXED[2]  # 1 + 1 + 64 + 2 + 64 + 3 tokens
    with engine(llava, schedule) as llm:
        held = blocks_held(llm)
        check(llava, schedule, [ask], answer(llm, [ask], 2))
        text, kept = 1 + 1 + 2 + 3, (64, 16, 8)
        [seen] = map(set, held.values())
        assert seen == {tuple(-(-(text + 2 * n + 1) // BLOCK) for n in kept)} | (
            seen & {tuple(-(-(text + 2 * n) // BLOCK) for n in kept)}
        )
        assert_pool_free(llm)


def test_empty_schedule_and_text_equal_stock(llava):
    """Without boundaries, and for text, ADSC's engine is vLLM's: same tokens, same blocks."""
    text = [ask for ask in MIXED if not ask.seeds]
    made = []
    for schedule, asks in ((None, MIXED), ("", MIXED), ("2:1/3,4:1/2", text)):
        with engine(llava, schedule) as llm:
            held = blocks_held(llm)
            outputs = answer(llm, asks)
            groups = scheduler_of(llm).kv_cache_config.kv_cache_groups
            layers = [len(group.layer_names) for group in groups]
            made.append(
                {
                    o.prompt: (
                        o.outputs[0].token_ids,
                        logprobs(o),
                        [sum(map(mul, layers, blocks)) for blocks in held[o.request_id]],
                    )
                    for o in outputs
                }
            )
    stock, empty, compressed = made
    assert empty == stock
    assert all(blocks for *_, blocks in stock.values())
    assert compressed == {prompt: stock[prompt] for prompt in compressed}


def logprobs(output) -> list[float]:
    made = output.outputs[0]
    return [row[token].logprob for row, token in zip(made.logprobs, made.token_ids, strict=True)]
