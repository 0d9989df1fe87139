"""The OpenAI-compatible server under load: mixed requests, some cancelled, some malformed.

ADSC_SOAK_REQUESTS says how many; each completed answer is compared with the thin LLaVA's.
"""

from __future__ import annotations

import base64
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import APIStatusError, OpenAI
from PIL import Image

import adsc_kernels
from adsc_kernels.llava import Llava

MODEL = Path(adsc_kernels.__file__).parent / "checkpoints" / "tiny-llava-digits"
SCHEDULE = "4:1/4,8:1/4,12:1/4"
REQUESTS = int(os.environ.get("ADSC_SOAK_REQUESTS", "60"))
BLOCKS = 90  # of 4 groups: five requests' worth


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {
        "model": str(MODEL),
        "served-model-name": "digits",
        "hf-overrides": '{"architectures": ["AdscLlavaForConditionalGeneration"]}',
        "additional-config": json.dumps({"adsc_schedule": SCHEDULE, "adsc_align": "block"}),
        "dtype": "float32",
        "block-size": "32",
        "max-model-len": "704",
        "max-num-seqs": "8",
        "num-gpu-blocks-override": str(BLOCKS),
        "limit-mm-per-prompt": '{"image": 1}',
        "host": "127.0.0.1",
        "port": str(port),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [f"--{name}={value}" for name, value in arguments.items()]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with (
        log.open("w") as out,
        subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT) as server,
    ):
        try:
            deadline = time.monotonic() + 240
            while True:
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


def picture_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def content(question: str, *urls: str) -> list[dict]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [*images, {"type": "text", "text": question}]


def metric(url: str, name: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    lines = [line for line in text.splitlines() if line.startswith(f"vllm:{name}{{")]
    return sum(float(line.split()[-1]) for line in lines)


def test_soak(url):
    asked = json.loads((MODEL / "pictures" / "questions.json").read_text())
    pairs = [(MODEL / "pictures" / name, q["question"]) for name in asked for q in asked[name]][:24]
    # Long enough behind the picture that a prefix-cache hit can end there.
    pairs += [(path, " ".join([question] * 6)) for path, question in pairs[:6]]
    # Under adsc_align the images keep what the aligned schedule keeps.
    from adsc_kernels import CompressionSchedule
    from adsc_kernels.integrations.vllm.layout import aligned_schedule

    schedule = aligned_schedule(CompressionSchedule.parse(SCHEDULE, 16), (0, 576, 24, 24), 32)
    thin = Llava.from_pretrained(MODEL, schedule, "cpu")
    texts = ["How many 3s are there?", "What is in the picture?"]
    prompts = [f"USER: <image>\n{question} ASSISTANT:" for _, question in pairs]
    images = [[Image.open(path).convert("RGB")] for path, _ in pairs]
    prompts += [f"USER: {text} ASSISTANT:" for text in texts]
    made = thin.generate(prompts, images + [[], []], max_new_tokens=12)
    cases = [content(question, picture_url(path)) for path, question in pairs] + texts
    expected = list(zip(cases, made.texts, strict=True))

    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=0)
    options = dict(model="digits", temperature=0, max_tokens=12)
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
        case, text = rng.choice(expected)
        message = [{"role": "user", "content": case}]
        if kind < 0.2:
            stream = client.chat.completions.create(messages=message, stream=True, **options)
            next(iter(stream))
            stream.close()
            return "cancelled"
        answer = client.chat.completions.create(messages=message, **options)
        assert answer.choices[0].message.content.strip() == text.strip()
        return "answered"

    with ThreadPoolExecutor(16) as pool:
        done = list(pool.map(ask, range(REQUESTS)))
    assert {"refused", "cancelled", "answered"} == set(done)
    for _ in range(100):  # cancelled ones end with a step of their own
        if not metric(url, "num_requests_running"):
            break
        time.sleep(0.1)
    assert metric(url, "num_requests_running") == metric(url, "num_requests_waiting") == 0
    assert metric(url, "kv_cache_usage_perc") == 0
    assert metric(url, "prefix_cache_hits_total") > 0
    print(f"soak: {REQUESTS} requests, {metric(url, 'num_preemptions_total'):.0f} preemptions")
