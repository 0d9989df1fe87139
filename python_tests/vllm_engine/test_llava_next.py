"""LLaVA-NeXT: an overview and tiles, whose newline tokens stay, against the oracle."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
from engines import BLOCK, Checkpoint, assert_pool_free, drawn, engine
from llava_oracle import decode
from PIL import Image
from tiny_checkpoints import IMAGE_ID, VOCAB, picture, save_processor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)

SIDE = 8  # patches along each side of a tile
TILE = 4 * SIDE  # pixels
# Width, height; of the last two no row of tiles is left, and rows of newlines only.
SIZES = [(TILE, TILE), (2 * TILE, TILE), (40, 90), (64, 50), (300, 1), (1, 300)]
ARCHITECTURE = {"architectures": ["AdscLlavaNextForConditionalGeneration"]}


@pytest.fixture(scope="module")
def next_llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava_next")
    text = LlamaConfig(
        vocab_size=len(VOCAB) + 4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=TILE,
        patch_size=4,
        projection_dim=16,
    )
    pinpoints = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [3 * TILE, TILE]]
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )
    hf = drawn(LlavaNextForConditionalGeneration, config, seed=1, std=0.25)
    hf.save_pretrained(folder)
    save_processor(folder, SIDE)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"image_processor_type": "LlavaNextImageProcessor"}
    settings |= {"image_grid_pinpoints": pinpoints}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = {
        "processor_class": "LlavaNextProcessor",
        "image_token": "<image>",
        "patch_size": 4,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    image_processor = LlavaNextProcessor.from_pretrained(folder).image_processor
    return Checkpoint(folder, hf.double(), image_processor)


@torch.no_grad()
def expected(checkpoint: Checkpoint, ids: list[int], images, boundaries) -> torch.Tensor:
    """Log-probabilities, from embeddings laid out by transformers' own packing."""
    hf = checkpoint.hf
    torch.set_default_dtype(torch.float64)
    try:
        inputs = checkpoint.image_processor(images=images, return_tensors="pt")
        features = hf.model.get_image_features(
            inputs["pixel_values"].double(), image_sizes=inputs["image_sizes"]
        ).pooler_output
        x, spans, i = hf.model.language_model.embed_tokens(torch.tensor([ids])), [], 0
        for rows in features:
            i = ids.index(IMAGE_ID, i)
            x[0, i : i + len(rows)] = rows
            tokens = list(range(i, i + len(rows)))
            spans.append([tokens[r * SIDE : (r + 1) * SIDE] for r in range(SIDE)])
            newline = (rows == hf.model.image_newline).all(-1).tolist()
            tiles, row = [], []
            for token, ends in zip(tokens[SIDE * SIDE :], newline[SIDE * SIDE :], strict=True):
                if ends:
                    tiles, row = [*tiles, row], []
                else:
                    row.append(token)
            spans.append(tiles)
            i += len(rows)
        logits, _ = decode(hf, x, spans, boundaries)
    finally:
        torch.set_default_dtype(torch.float32)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("budget", [2048, 50])
def test_tiles_and_newlines(next_llava, budget):
    from vllm import SamplingParams

    schedule, boundaries = "1:1/3,3:1/2", {1: Fraction(1, 3), 3: Fraction(1, 2)}
    pictures: list[Image.Image] = [picture(n, size) for n, size in enumerate(SIZES)]
    asks = [("w1 <image> w2 w3", [image]) for image in pictures]
    asks.append(("<image> w4 <image> w5", pictures[1:3]))
    requests = [{"prompt": text, "multi_modal_data": {"image": some}} for text, some in asks]
    greedy = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
    options = dict(max_model_len=1024, max_num_batched_tokens=budget, max_num_seqs=4)
    with engine(
        next_llava, schedule, hf_overrides=ARCHITECTURE, block_size=BLOCK, **options
    ) as llm:
        outputs = llm.generate(requests, greedy, use_tqdm=False)
        assert_pool_free(llm)
    for (_, images), output in zip(asks, outputs, strict=True):
        made = output.outputs[0]
        whole = list(output.prompt_token_ids) + list(made.token_ids)
        logprobs = expected(next_llava, whole, images, boundaries)[-7:-1]
        assert list(made.token_ids) == logprobs.argmax(-1).tolist()
        for row, token, wanted in zip(made.logprobs, made.token_ids, logprobs, strict=True):
            assert abs(row[token].logprob - float(wanted.max())) < 2e-5
