"""The bundled checkpoint: the thin LLaVA and a patched transformers model give the same answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, pipeline

from adsc_kernels.integrations.hf import apply_adsc
from adsc_kernels.llava import Llava, bundled_checkpoint, load_image

SCHEDULES = ["4:1/4,8:1/4,12:1/4", "2:1/2x1/2,6:1/2x1/3@grid@renumber"]
FOLDER = bundled_checkpoint()
PICTURES = FOLDER / "pictures"


@pytest.fixture(scope="module")
def both() -> tuple[Any, Any, Any]:
    model = LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
    thin = Llava.from_pretrained(FOLDER, None, torch.get_default_device(), torch.float32)
    return model, AutoProcessor.from_pretrained(FOLDER), thin


def asked() -> list[tuple[Any, list[str]]]:
    known = json.loads((PICTURES / "questions.json").read_text())
    return [
        (load_image(PICTURES / name), [q["question"] for q in questions])
        for name, questions in known.items()
    ]


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_answers_are_the_thin_models(both, schedule):
    model, processor, thin = both
    thin = thin.with_schedule(schedule)
    for picture, questions in asked()[:2]:
        prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in questions]
        want = thin.generate(prompts, [[picture]] * len(prompts), max_new_tokens=12)
        inputs = processor(
            text=prompts, images=[picture] * len(prompts), padding=True, return_tensors="pt"
        )
        with apply_adsc(model, schedule):
            out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        got = processor.batch_decode(new, skip_special_tokens=True)
        assert [text.strip() for text in got] == [text.strip() for text in want.texts]


def test_a_pipeline_runs_a_patched_model(both):
    model, processor, _ = both
    picture, questions = asked()[0]
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture},
                {"type": "text", "text": questions[0]},
            ],
        }
    ]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    with apply_adsc(model, SCHEDULES[0]), torch.no_grad():
        got = pipe(text=messages, max_new_tokens=12, return_full_text=False)
        inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    want = processor.decode(out, skip_special_tokens=True).strip()
    assert got[0]["generated_text"].strip() == want
