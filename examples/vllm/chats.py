"""Chats about pictures, each turn's prompt beginning as the last one's: stock vLLM beside ADSC.

python examples/vllm/chats.py --wide 1024    # random weights, a decoder of this hidden size

Two servers run at once on a CPU, both with prefix caching. In each round the chats of `chats` are
held with one and then with the other, either first by turns, with other pictures each time.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import mean

import numpy as np
from checkpoints import MODEL, as_vllm_reads, wide
from client import message
from openai import OpenAI
from PIL import Image
from server import metric, serving

SIDE = 48  # pixels: 576 tokens
FRONT = {"role": "user", "content": "You are a careful reader of digits. " * 8}
ANSWER = {"role": "assistant", "content": "1 2 3 4"}  # whatever was said: one prompt for both
HITS = "prefix_cache_hits_total"


def picture(rng: np.random.Generator) -> bytes:
    png = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(png, "PNG")
    return png.getvalue()


def chats(rng: np.random.Generator) -> list[list[list[dict]]]:
    """Of each chat the messages of each turn: a second question about a picture, and three turns
    with a new picture each; both with and without a text in front."""
    made = []
    for front in ([], [FRONT]):
        png = picture(rng)
        questions = ("Read row 1.", "How many 3s are there?")
        made.append([front + message(png, question) for question in questions])
        turns: list[list[dict]] = []
        for _ in range(3):
            before = [*turns[-1], ANSWER] if turns else front
            turns.append(before + message(picture(rng), "Read row 1."))
        made.append(turns)
    return made


def hold(url: str, model: Path, tokens: int, seed: int) -> dict[str, float]:
    """All chats at once: requests a second, and tokens found in the prefix cache."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600, max_retries=0)

    def one(turns: list[list[dict]]) -> int:
        for messages in turns:
            client.chat.completions.create(
                model=model.name,
                messages=messages,
                temperature=0,
                max_tokens=tokens,
                extra_body={"ignore_eos": True, "add_special_tokens": True},
            )
        return len(turns)

    some, before, start = chats(np.random.default_rng(seed)), metric(url, HITS), time.monotonic()
    with ThreadPoolExecutor(len(some)) as pool:
        requests = sum(pool.map(one, some))
    seconds = time.monotonic() - start
    return {
        "requests_per_s": round(requests / seconds, 4),
        "seconds": round(seconds, 2),
        "cached_tokens": metric(url, HITS) - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wide", type=int, metavar="HIDDEN", help="random weights of this size")
    parser.add_argument("--schedule", default="4:1/4,8:1/4,12:1/4")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every run here too")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    # Room for all: nothing is evicted between turns.
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "2"}
    options = {"dtype": "float32", "block_size": 32, "max_model_len": 2304}
    limit = {"image": 3}
    runs: list[dict] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        there = Path(folder)
        model = wide(there, args.wide) if args.wide else as_vllm_reads(MODEL, there)
        urls = {
            name: stack.enter_context(
                serving(model, schedule, "--enforce-eager", limit_mm_per_prompt=limit, **options)
            )
            for name, schedule in {"stock": None, "adsc": args.schedule}.items()
        }
        for seed in range(args.rounds):
            for name in [*urls][:: -1 if seed % 2 else 1]:
                result = hold(urls[name], model, args.tokens, seed)
                runs.append({"server": name, "round": seed, **result})
                print(json.dumps(runs[-1]), flush=True)
    rates = {
        name: mean(run["requests_per_s"] for run in runs if run["server"] == name)
        for name in ("stock", "adsc")
    }
    print(f"{rates['adsc'] / rates['stock']:.2f} times stock vLLM's requests a second")
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"settings": settings, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
