"""No request ends the engine: drawn bad ones, between good ones, and the engine answers as before.

ADSC_BAD_REQUESTS says how many of each schedule's.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import (
    IMAGE_TOKENS,
    MIXED,
    answer,
    assert_pool_free,
    check,
    engine,
    scheduler_of,
    words,
)
from PIL import Image
from tiny_checkpoints import IMAGE_ID, picture
from vllm import SamplingParams
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.cache import MultiModalCacheMissError
from vllm.sampling_params import BeamSearchParams

REQUESTS = int(os.environ.get("ADSC_BAD_REQUESTS", "250"))
HIDDEN = 32  # of the tiny model


def embeddings(rng: random.Random) -> Any:
    """Of the right shape now and then."""
    rows = rng.choice([0, 1, IMAGE_TOKENS - 1, IMAGE_TOKENS, IMAGE_TOKENS + 1, 100])
    width = rng.choice([HIDDEN, HIDDEN, HIDDEN, HIDDEN + 1, 0])
    shape = rng.choice([(rows, width), (1, rows, width), (rows,), (2, 1, rows, width)])
    made = torch.zeros(shape, dtype=rng.choice([torch.float32, torch.float32, torch.int64]))
    return rng.choice([made, [made], [made, made]])


def image(rng: random.Random) -> Image.Image:
    size = rng.choice([(32, 32), (1, 1), (0, 4), (4, 0), (2000, 3), (600, 600)])
    return rng.choice([picture(rng.randrange(4)), Image.new(rng.choice(["RGB", "L", "P"]), size)])


def prompt(rng: random.Random) -> str | list[int]:
    """With any number of images' places, the last of them at the end now and then."""
    places = " <image> ".join(
        words(rng.randrange(40), rng.randrange(30)) for _ in range(rng.randrange(4))
    )
    tokens = [rng.choice([5, 6, 7, IMAGE_ID, 10**6, -1]) for _ in range(rng.randrange(9))]
    return rng.choice([places] * 6 + [places + " <image>", "", words(1, 700), tokens])


def request(rng: random.Random) -> dict[str, Any]:
    text = prompt(rng)
    made: dict[str, Any] = {"prompt" if isinstance(text, str) else "prompt_token_ids": text}
    count = text.count("<image>") if isinstance(text, str) else text.count(IMAGE_ID)
    count = rng.choice([count] * 6 + [0, 1, 2, 9])
    data = rng.choice(["images"] * 4 + ["embeddings", "none", "video"])
    if data == "images":
        made["multi_modal_data"] = {"image": [image(rng) for _ in range(count)]}
    elif data == "embeddings":
        made["multi_modal_data"] = {"image": embeddings(rng)}
    elif data == "video":
        made["multi_modal_data"] = {"video": torch.zeros(2, 3, 8, 8)}
    if rng.random() < 0.15:
        names = [rng.choice(["one", "two", None]) for _ in range(count)]
        made["multi_modal_uuids"] = {"image": names}
        if rng.random() < 0.5:
            made["multi_modal_data"] = {"image": [None] * count}
    return made


def parameters(rng: random.Random) -> SamplingParams:
    options: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 8, 60]), "temperature": 0}
    options |= rng.choice(
        [{}, {}, {}, {"n": 3, "temperature": 1}, {"prompt_logprobs": 1}, {"seed": 3}]
    )
    return SamplingParams(**options)


class EngineEndedError(BaseException):
    """In a process of its own, the engine would have ended by this."""


def guard(core: Any) -> None:
    """What the core raises once it has a request ends it; what comes before is the request's."""
    for name in ("add_request", "step_fn"):
        call = getattr(core, name)

        def guarded(*args: Any, call: Callable[..., Any] = call) -> Any:
            try:
                return call(*args)
            except Exception as error:
                raise EngineEndedError from error

        setattr(core, name, guarded)


def bad_requests(llm: Any, count: int, refused: Counter) -> set[type[Exception]]:
    """Added while others run, aborted at any stage of their lives. Returns what a server would
    answer as a fault of its own."""
    faults = set()
    rng, core, alive = random.Random(0), llm.llm_engine, []
    guard(core.engine_core.engine_core)
    for number in range(count):
        name = f"bad-{number}"
        try:
            core.add_request(name, request(rng), parameters(rng), priority=rng.randrange(3))
            alive.append(name)
        except Exception as error:
            refused[type(error).__name__] += 1
            if create_error_response(error).error.code >= 500:
                faults.add(type(error))
        for _ in range(rng.choice([0, 0, 1, 3])):
            step(core, refused)
        if alive and rng.random() < 0.4:
            core.abort_request([alive.pop(rng.randrange(len(alive)))])
    # The core's own count: vLLM's client goes on counting some that were aborted or refused late.
    scheduler = scheduler_of(llm)
    for _ in range(3000):
        if not scheduler.has_unfinished_requests():
            core.abort_request(list(core.output_processor.request_states), internal=True)
            return faults
        step(core, refused)
    left = [(name, r.num_computed_tokens, r.status) for name, r in scheduler.requests.items()]
    raise AssertionError(f"expected all to finish, got {left}")


def step(core: Any, refused: Counter) -> None:
    for output in core.step():
        refused[f"finished: {output.outputs[0].finish_reason}"] += output.finished


# Stock vLLM's at more images than places for them, which it sees when it has processed them. Its
# engine hasn't got those then, and whoever sends one next is asked to try again.
STOCK_FAULTS = {AssertionError, MultiModalCacheMissError}


@pytest.mark.parametrize(
    ("schedule", "expected_faults"),
    [(None, STOCK_FAULTS), ("2:1/3,4:1/2", set()), ("2:1/2x1/4,4:1/2x1@grid", set())],
)
def test_bad_requests(llava, schedule, expected_faults):
    options = dict(enable_prefix_caching=True, enable_mm_embeds=True, scheduling_policy="priority")
    refused: Counter = Counter()
    with engine(llava, schedule, num_gpu_blocks_override=60, **options) as llm:
        before = good(llava, llm, schedule or "")
        assert bad_requests(llm, REQUESTS, refused) == expected_faults
        beams(llm)
        print(dict(refused))
        assert good(llava, llm, schedule or "") == before
        assert_pool_free(llm)
    assert sum(refused.values()) >= REQUESTS / 2
    assert refused["finished: length"]


def good(llava: Any, llm: Any, schedule: str) -> list[list[int]]:
    outputs = answer(llm, MIXED, 4)
    check(llava, schedule, MIXED, outputs)
    return [output.outputs[0].token_ids for output in outputs]


def beams(llm: Any) -> None:
    some = [ask.as_vllm() for ask in MIXED[:2]]
    [first, second] = llm.beam_search(some, BeamSearchParams(beam_width=3, max_tokens=4))
    assert len(first.sequences) == len(second.sequences) == 3


def quietly(some: Callable[[], Any]) -> bool:
    """Whether it raises what vLLM answers with HTTP 400."""
    try:
        some()
    except VLLMValidationError:
        return True
    return False


def test_embeddings_without_a_grid(llava):
    """Refused before the engine sees them; without rows and columns their number is free."""
    ask = {"prompt": "w1 <image> w2", "multi_modal_data": {"image": torch.zeros(1, 50, HIDDEN)}}
    refused = []
    for schedule in ("2:1/2x1/4@grid", "2:1/3"):
        with engine(llava, schedule, enable_mm_embeds=True) as llm:
            refused.append(quietly(lambda llm=llm: llm.generate([ask], use_tqdm=False)))
            check(llava, schedule, MIXED[:1], answer(llm, MIXED[:1], 3))
    assert refused == [True, False]


def test_images_that_cannot_be_placed(llava, monkeypatch):
    """What only the engine's core sees is finished as an error there, and ends nothing."""
    from adsc_kernels.integrations.vllm import spans

    placeholders = spans.placeholders

    def fail(features):
        if len(features) > 1:
            raise RuntimeError("no place")
        return placeholders(features)

    monkeypatch.setattr(spans, "placeholders", fail)
    with engine(llava, "2:1/3,4:1/2") as llm:
        outputs = answer(llm, [MIXED[2], MIXED[0]], 4)
        assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length"]
        check(llava, "2:1/3,4:1/2", MIXED[:1], outputs[1:])
