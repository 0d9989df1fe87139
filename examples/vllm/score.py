"""The digits questions through the server that `serve.sh` started: exact answers, by kind.

python examples/vllm/score.py --pictures 40
python examples/vllm/score.py --pictures 40 --thin 4:1/4,8:1/4,12:1/4    # beside adsc_kernels.llava
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from client import message
from openai import OpenAI
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "digits"))
from evaluate import MODEL, Answer, adsc_answer, evaluate


def server_answer(url: str) -> Answer:
    """Answer with the server at this address, 16 questions at a time."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")

    def ask(question: str, image: Image.Image) -> str:
        png = io.BytesIO()
        image.save(png, "PNG")
        answer = client.chat.completions.create(
            model="tiny-llava-digits",
            messages=message(png.getvalue(), question),
            temperature=0,
            max_tokens=12,
            extra_body={"add_special_tokens": True},
        )
        return (answer.choices[0].message.content or "").strip()

    def answer(prompts: list[str], images: list[Image.Image]) -> list[str]:
        questions = [p.split("<image>")[1].replace("ASSISTANT:", "").strip() for p in prompts]
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(ask, questions, images))

    return answer


def recorded(answer: Answer, texts: list[str]) -> Answer:
    """The same, which also appends every answer to `texts`."""

    def keep(prompts: list[str], images: list[Image.Image]) -> list[str]:
        given = answer(prompts, images)
        texts.extend(given)
        return given

    return keep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--thin", metavar="SCHEDULE", help="score adsc_kernels.llava too")
    args = parser.parse_args()
    contestants = {"server": server_answer(args.url)}
    if args.thin is not None:
        contestants["thin"] = adsc_answer(MODEL, "cpu", torch.float32, args.thin)
    texts: dict[str, list[str]] = {name: [] for name in contestants}
    for name, answer in contestants.items():
        score = evaluate(recorded(answer, texts[name]), args.pictures, args.seed)
        print(name, json.dumps(score, indent=2))
    if args.thin is not None:
        differ = sum(a != b for a, b in zip(texts["server"], texts["thin"], strict=True))
        print(f"{differ} of {len(texts['thin'])} answers differ")


if __name__ == "__main__":
    main()
