"""Ask the bundled model about its pictures through vLLM, with fewer vision tokens in later layers.

python examples/vllm/offline.py                              # in an environment with vLLM
python examples/vllm/offline.py --schedule ''                # drops nothing
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from PIL import Image
from vllm import LLM, SamplingParams

MODEL = Path(__file__).parents[2] / "adsc_kernels" / "checkpoints" / "tiny-llava-digits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedule", default="4:1/4,8:1/4,12:1/4")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; by itself vLLM wants 0.92 of memory
    llm = LLM(
        str(MODEL),
        hf_overrides={"architectures": ["AdscLlavaForConditionalGeneration"]},
        additional_config={"adsc_schedule": args.schedule},
        dtype="float32",
        block_size=32,
        max_model_len=1024,
        enforce_eager=True,
    )
    folder = MODEL / "pictures"
    asked = json.loads((folder / "questions.json").read_text())
    requests = [
        {
            "prompt": f"USER: <image>\n{question['question']} ASSISTANT:",
            "multi_modal_data": {"image": Image.open(folder / picture)},
        }
        for picture, questions in asked.items()
        for question in questions
    ]
    answers = llm.generate(requests, SamplingParams(temperature=0, max_tokens=12))
    for request, answer in zip(requests, answers, strict=True):
        print(request["prompt"].split("\n")[1], "->", answer.outputs[0].text.strip())


if __name__ == "__main__":
    main()
