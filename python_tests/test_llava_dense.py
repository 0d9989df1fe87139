"""Without compression the thin LLaVA is transformers' LLaVA."""

from __future__ import annotations

import pytest
import torch
from llava_case import IMAGES, PROMPTS, begin, relative_error, run_whole
from tiny_checkpoints import ROPE_LLAMA3, VOCAB, make_checkpoint

from adsc_kernels.llava import Llava

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 128,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [2.0, 3.0, 5.0, 7.0],
}
CONFIGS = {
    "mha": {},
    "gqa": {"kv_heads": 2, "names": "5"},
    "mqa-bias-head_dim": {"kv_heads": 1, "attention_bias": True, "head_dim": 12},
    "tied-nested": {"tied": True, "names": "4-nested"},
    "tied-5": {"tied": True, "names": "5"},
    "sharded": {"shard": "20KB"},
    "sharded-5": {"shard": "20KB", "names": "5", "kv_heads": 2},
    "llama3": {"rope": ROPE_LLAMA3},
    "linear": {"rope": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "dynamic": {"rope": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    "yarn": {"rope": YARN},
    "longrope": {"rope": LONGROPE},
    "full": {"select": "full", "feature_layer": -1},
    "layers": {"feature_layer": [-2, 1, 3]},
    "odd grid": {"grid": 5, "layers": 3},
}


def transformers_logits(hf, model: Llava) -> list[torch.Tensor]:
    talk, _ = begin(model)
    found = []
    for tokens, images in zip(talk.tokens, IMAGES, strict=True):
        pixels = model.processor.pixels(images) if images else None
        with torch.no_grad():
            found.append(hf(input_ids=torch.tensor([tokens]), pixel_values=pixels).logits[0])
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, tmp_path):
    hf = make_checkpoint(tmp_path, seed=len(name), **CONFIGS[name])
    model = Llava.from_pretrained(tmp_path, device="cpu")
    for got, want in zip(run_whole(model), transformers_logits(hf, model), strict=True):
        assert relative_error(got, want) < 1e-4


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_greedy_tokens_equal_transformers(kv_heads, tmp_path):
    hf = make_checkpoint(tmp_path, seed=11, kv_heads=kv_heads)
    model = Llava.from_pretrained(tmp_path, device="cpu")
    answer = model.generate(PROMPTS, IMAGES, max_new_tokens=32)
    assert len({tuple(ids) for ids in answer.token_ids}) == len(PROMPTS)  # else nothing is tested
    talk, _ = begin(model)
    for tokens, images, got in zip(talk.tokens, IMAGES, answer.token_ids, strict=True):
        ids = torch.tensor([tokens])
        extra = {"pixel_values": model.processor.pixels(images)} if images else {}
        mask = torch.ones_like(ids)
        want = hf.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=32, do_sample=False, **extra
        )
        assert got == want[0, ids.shape[1] :].tolist()


def test_bfloat16_stays_bfloat16(tmp_path):
    make_checkpoint(tmp_path, dtype=torch.bfloat16)
    model = Llava.from_pretrained(tmp_path, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.new_cache(1).stages[0].k[0].dtype is torch.bfloat16
    exact = Llava.from_pretrained(tmp_path, device="cpu", dtype=torch.float32)
    for got, want in zip(run_whole(model), run_whole(exact), strict=True):
        assert relative_error(got, want) < 0.05


def test_the_processor_expands_as_transformers_does(tmp_path):
    from transformers import LlavaProcessor

    make_checkpoint(tmp_path)
    model = Llava.from_pretrained(tmp_path, device="cpu")
    theirs = LlavaProcessor(
        model.processor.image_processor,
        model.processor.tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    talk, _ = begin(model)
    for prompt, images, tokens in zip(PROMPTS, IMAGES, talk.tokens, strict=True):
        want = theirs(text=prompt, images=images or None, return_tensors="pt")
        assert want["input_ids"][0].tolist() == tokens
        if images:
            assert torch.equal(want["pixel_values"], model.processor.pixels(images))
    assert VOCAB["<s>"] == talk.tokens[0][0]
