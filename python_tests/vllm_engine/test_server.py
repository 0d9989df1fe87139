"""The OpenAI-compatible server under load: mixed requests, some cancelled, some malformed.

ADSC_SOAK_REQUESTS says how many; each completed answer is compared with the thin LLaVA's.
"""

from __future__ import annotations

import base64
import json
import os
import random
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from openai import APIStatusError, OpenAI
from PIL import Image

from adsc_kernels import CompressionSchedule
from adsc_kernels.integrations.vllm.layout import aligned_schedule
from adsc_kernels.llava import Llava

sys.path.append(str(Path(__file__).parents[2] / "examples" / "vllm"))
from checkpoints import MODEL
from score import adsc_answer, evaluate, recorded, server_answer
from server import metric, serving

SCHEDULE = "4:1/4,8:1/4,12:1/4"
REQUESTS = int(os.environ.get("ADSC_SOAK_REQUESTS", "60"))
BLOCKS = 94  # three requests about a picture hold 90; one that outgrows its blocks wants 4 more
COUNTERS = ("num_preemptions_total", "prefix_cache_hits_total", "prefix_cache_queries_total")


@pytest.fixture(scope="module")
def url():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        with serving(
            MODEL,
            SCHEDULE,
            "--enforce-eager",
            additional_config={"adsc_align": "block"},
            dtype="float32",
            block_size=32,
            max_model_len=704,
            max_num_seqs=8,
            num_gpu_blocks_override=BLOCKS,
            limit_mm_per_prompt={"image": 1},
        ) as address:
            yield address


def picture_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def content(question: str, *urls: str) -> list[dict]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [*images, {"type": "text", "text": question}]


def thin_schedule() -> CompressionSchedule:
    """What the aligned images of that server keep."""
    schedule = CompressionSchedule.parse(SCHEDULE, 16)
    aligned = aligned_schedule(schedule, (0, 576, 24, 24), 32)
    assert aligned is not None
    return aligned


def test_digits(url):
    """Held-out pictures: the server answers what the thin LLaVA answers."""
    thin = adsc_answer(MODEL, "cpu", torch.float32, str(thin_schedule()))
    texts: list[list[str]] = [[], []]
    scores = [
        evaluate(recorded(answer, some), pictures=3, seed=2)
        for answer, some in zip([server_answer(url), thin], texts, strict=True)
    ]
    assert texts[0] == texts[1]
    assert scores[0]["by_kind"] == scores[1]["by_kind"]
    assert scores[0]["accuracy"] > 0.8


def test_soak(url):
    asked = json.loads((MODEL / "pictures" / "questions.json").read_text())
    # A cell, a row, the whole picture; repeated, so that some outgrow their last block, and that a
    # prefix-cache hit can end behind a picture.
    pairs = [
        (MODEL / "pictures" / name, " ".join([asked[name][n]["question"]] * times))
        for name in asked
        for n in (0, -2, -1)
        for times in (1, 3, 4, 5, 6)
    ]
    thin = Llava.from_pretrained(MODEL, thin_schedule(), "cpu", torch.float32)
    texts = ["How many 3s are there?", "What is in the picture? " * 30]
    prompts = [f"USER: <image>\n{question} ASSISTANT:" for _, question in pairs]
    images = [[Image.open(path).convert("RGB")] for path, _ in pairs]
    prompts += [f"USER: {text} ASSISTANT:" for text in texts]
    made = thin.generate(prompts, images + [[], []], max_new_tokens=24)
    cases = [content(question, picture_url(path)) for path, question in pairs] + texts
    expected = list(zip(cases, made.texts, strict=True))

    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=0)
    options = dict(model=MODEL.name, temperature=0, max_tokens=24)
    options["extra_body"] = {"add_special_tokens": True}
    broken = "data:image/png;base64," + base64.b64encode(b"no picture").decode()
    malformed = [
        content("What digit is at row 1 column 3?", broken),
        content("How many 0s are there?", *[picture_url(pairs[0][0])] * 2),
        "What digit? " * 600,
    ]

    def ask(number: int) -> str:
        rng = random.Random(number)
        kind = rng.random()
        if kind < 0.1:
            message = [{"role": "user", "content": rng.choice(malformed)}]
            with pytest.raises(APIStatusError) as refused:
                client.chat.completions.create(messages=message, **options)
            assert 400 <= refused.value.status_code < 500
            return "refused"
        case, text = random.Random(number // 4).choice(expected)  # four ask the same
        message = [{"role": "user", "content": case}]
        if kind < 0.2:
            stream = client.chat.completions.create(messages=message, stream=True, **options)
            next(iter(stream))
            stream.close()
            return "cancelled"
        answer = client.chat.completions.create(messages=message, **options)
        assert answer.choices[0].message.content.strip() == text.strip()
        return "answered"

    # Each picture once, alone. vLLM hands its engine a picture with the first request that brings
    # it; another that brings it at the same moment and gets there first is answered with a 500.
    for path in sorted({path for path, _ in pairs}):
        message = [{"role": "user", "content": content("Read row 1.", picture_url(path))}]
        client.chat.completions.create(messages=message, **options)
    start = time.monotonic()
    done: Counter[str] = Counter()
    with ThreadPoolExecutor(16) as pool:
        # On a busy machine too few may meet for one to be preempted: then some more.
        for first in range(0, 5 * REQUESTS, REQUESTS):
            done.update(pool.map(ask, range(first, first + REQUESTS)))
            if metric(url, "num_preemptions_total") > 0:
                break
    seconds = time.monotonic() - start
    for _ in range(100):  # cancelled ones end with a step of their own
        if not metric(url, "num_requests_running"):
            break
        time.sleep(0.1)
    seen = {name: metric(url, name) for name in COUNTERS}
    print(f"soak: {dict(done)} in {seconds:.0f} s; {seen}")
    assert {"refused", "cancelled", "answered"} == set(done)
    assert metric(url, "num_requests_running") == metric(url, "num_requests_waiting") == 0
    assert metric(url, "kv_cache_usage_perc") == 0
    assert seen["prefix_cache_hits_total"] > 0
    assert seen["num_preemptions_total"] > 0
