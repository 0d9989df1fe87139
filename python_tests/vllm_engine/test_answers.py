"""Greedy tokens and log-probabilities equal the oracle's, however the engine is configured."""

from __future__ import annotations

from collections import defaultdict
from operator import mul

import pytest
from engines import (
    BLOCK,
    MIXED,
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


def test_named_kv_layouts():
    """A stage's backend takes those of the backend that it is made of."""
    from vllm.v1.attention.backend import subclass_attention_backend
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from adsc_kernels.integrations.vllm.builder import stage_builder

    builder = stage_builder(CPUAttentionBackend.get_builder_cls())
    made = subclass_attention_backend("Adsc", CPUAttentionBackend, builder)
    named = CPUAttentionBackend.supported_kv_cache_layouts()
    assert named
    assert made.supported_kv_cache_layouts() == named


def test_bigger_blocks(llava):
    run(llava, "2:1/3,4:1/2", block_size=128)


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
