"""The README's table of transformers models that `apply_adsc` serves, made of the test matrix.

python python_tests/hf/hf_table.py    # prints it; test_hf_table.py holds the README to it
"""

from __future__ import annotations

from hf_models import CASES, Case

NAMES = {
    "llava": "LLaVA-1.5",
    "llava-pixtral": "Pixtral",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL (DeepStack)",
    "internvl": "InternVL",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "gemma3": "Gemma 3",
    "mistral3": "Mistral 3",
    "paligemma": "PaliGemma",
}


def line(name: str, case: Case) -> str:
    rows = case.rows()
    kinds = ["images"]
    if any("pixel_values_videos" in row.inputs for row in rows):
        kinds.append("videos")
    pictures = " and ".join(kinds)
    return f"| {NAMES[name]} | `{case.config().model_type}` | {pictures} |"


def table() -> str:
    head = ["| model | `model_type` | pictures |", "| --- | --- | --- |"]
    return "\n".join(head + [line(name, CASES[name]) for name in NAMES])


if __name__ == "__main__":
    print(table())
