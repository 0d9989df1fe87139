"""The digits questions through the server that `serve.sh` started: exact answers, by kind.

python examples/vllm/score.py --pictures 40
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from client import message
from openai import OpenAI
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "digits"))
from evaluate import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")

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

    print(json.dumps(evaluate(answer, args.pictures, args.seed), indent=2))


if __name__ == "__main__":
    main()
