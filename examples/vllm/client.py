"""Stream an answer from the server that `serve.sh` started.

python examples/vllm/client.py [PICTURE [QUESTION]]
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from openai import OpenAI

PICTURES = Path(__file__).parents[2] / "adsc_kernels/checkpoints/tiny-llava-digits/pictures"


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def message(png: bytes, question: str) -> list[dict]:
    """A question about a picture, as the chat API takes it."""
    content = [
        {"type": "image_url", "image_url": {"url": data_url(png)}},
        {"type": "text", "text": question},
    ]
    return [{"role": "user", "content": content}]


def main() -> None:
    picture = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURES / "held-out-1.png"
    question = sys.argv[2] if len(sys.argv) > 2 else "What digit is at row 1 column 3?"
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    stream = client.chat.completions.create(
        model="tiny-llava-digits",
        messages=message(picture.read_bytes(), question),
        temperature=0,
        max_tokens=16,
        stream=True,
        extra_body={"add_special_tokens": True},  # the opening token, which the template leaves out
    )
    for part in stream:
        print(part.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
