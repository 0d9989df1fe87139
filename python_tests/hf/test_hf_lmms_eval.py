"""The model for lmms-eval on the bundled checkpoint: the real package where it is, else a stub."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
try:
    import lmms_eval.models.registry_v2  # noqa: F401
except ImportError:
    import lmms_eval_stub

    lmms_eval_stub.install()

from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelManifest
from transformers import AutoProcessor, LlavaForConditionalGeneration

from adsc_kernels import UnsupportedError
from adsc_kernels.integrations import lmms_eval as ours
from adsc_kernels.integrations.hf import apply_adsc
from adsc_kernels.llava import bundled_checkpoint, load_image

FOLDER = bundled_checkpoint()
PICTURE = "held-out-1.png"
QUESTIONS = [
    q["question"] for q in json.loads((FOLDER / "pictures" / "questions.json").read_text())[PICTURE]
][:3]
GREEDY = {"max_new_tokens": 6, "until": ["\n\n"]}


def options() -> dict[str, str]:
    return {"dtype": "float32", "device": str(torch.get_default_device())}


@pytest.fixture(scope="module")
def adapted() -> Any:
    model = ours.AdscModel(str(FOLDER), "4:1/4;8:1/4", batch_size="2", **options())
    picture = load_image(FOLDER / "pictures" / PICTURE)
    model.task_dict = {"digits": {"test": [(picture, question) for question in QUESTIONS]}}
    return model


def asked(doc: tuple[Any, str]) -> list[dict[str, Any]]:
    """A document as lmms-eval's chat tasks have it."""
    content = [{"type": "image", "url": doc[0]}, {"type": "text", "text": doc[1]}]
    return [{"role": "user", "content": content}]


def request(number: int, options: dict[str, Any] = GREEDY, messages: Any = asked) -> Any:
    arguments = ("", messages, options, number, "digits", "test")
    metadata = {"task": "digits", "doc_id": number, "repeats": 1}
    return Instance("generate_until", arguments, number, metadata)


@torch.no_grad()
def test_answers_are_the_patched_models_in_order(adapted):
    """Three of one kind in batches of two, and one with other options between them."""
    short = {"max_new_tokens": 1}
    order = [(2, GREEDY), (0, GREEDY), (1, short), (1, GREEDY)]
    got = adapted.generate_until([request(*which) for which in order])
    plain = LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(FOLDER)
    apply_adsc(plain, "4:1/4,8:1/4")
    want = []
    for number, options in order:
        picture, question = adapted.task_dict["digits"]["test"][number]
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
        out = plain.generate(**inputs, max_new_tokens=options["max_new_tokens"], do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        want.append(processor.decode(new, skip_special_tokens=True).strip())
    assert [text.strip() for text in got] == want
    assert len(set(want)) > 1


def test_it_is_compressed_and_keeps_all_for_a_baseline(adapted):
    assert str(adapted.applied.schedule) == "4:1/4,8:1/4"
    adapted.generate_until([request(0)])
    dense = ours.AdscModel(str(FOLDER), "1:1", **options())
    dense.task_dict = adapted.task_dict
    dense.generate_until([request(0)])
    assert adapted.applied.columns.shape[1] < dense.applied.columns.shape[1]


@pytest.mark.parametrize(
    ("until", "left"), [("b", "a "), (["c", "b"], "a "), ([], "a b c"), (["", "x"], "a b c")]
)
def test_an_answer_ends_before_the_first_of_its_ends(until, left):
    assert ours._cut("a b c", until) == left


def test_options_are_those_of_generate():
    sampled = {"max_new_tokens": 9, "temperature": 0.5, "do_sample": True}
    assert ours._options({"max_new_tokens": 9, "temperature": 0.5}) == sampled
    greedy = ours._options({"temperature": 0, "top_p": 0.9, "until": "x"})
    assert greedy["do_sample"] is False and greedy["top_p"] is None
    with pytest.warns(UserWarning, match="image_aspect_ratio go unused"):
        ours._options({"image_aspect_ratio": "pad"})


def test_it_is_found_by_its_manifest():
    found = ours.manifest()
    assert isinstance(found, ModelManifest) and found.model_id == "adsc"
    module, name = found.chat_class_path.rsplit(".", 1)
    model = getattr(importlib.import_module(module), name)
    assert model is ours.AdscModel and not model.is_simple


def test_what_is_not_served_is_refused(adapted):
    sound = [{"role": "user", "content": [{"type": "audio", "url": "x"}]}]
    with pytest.raises(UnsupportedError, match="text, images or videos, got audio"):
        adapted.generate_until([request(0, messages=lambda doc: sound)])
    with pytest.raises(UnsupportedError, match="log-likelihoods"):
        adapted.loglikelihood([])
    with pytest.raises(UnsupportedError, match="one round"):
        adapted.generate_until_multi_round([])
    with pytest.raises(TypeError, match="batch_size: expected an int, got 'auto'"):
        ours.AdscModel(str(FOLDER), "1:1", batch_size="auto")
