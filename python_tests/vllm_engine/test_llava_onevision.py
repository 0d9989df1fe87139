"""LLaVA-OneVision: tiles, fewer where they are many, and pooled frames, against the oracle."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from engines import BLOCK, Checkpoint, assert_pool_free, drawn, engine, parse, words
from llava_oracle import decode
from test_qwen2_5_vl import PADS, VOCAB, save_processor
from tiny_checkpoints import picture
from transformers import (
    AutoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

SIDE = 5  # patches along each side of a tile; odd, as of the published models
HALF = 3  # of a frame
TILE = 4 * SIDE  # pixels
IMAGE, VIDEO = PADS["image"], PADS["video"]
ARCHITECTURE = {"architectures": ["AdscLlavaOnevisionForConditionalGeneration"]}


@pytest.fixture(scope="module")
def onevision(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava_onevision")
    text = Qwen2Config(
        vocab_size=len(VOCAB) + 4,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=VOCAB["<s>"],
        eos_token_id=None,
    )
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=TILE,
        patch_size=4,
        vision_use_head=False,
    )
    shapes = [(2, 1), (1, 2), (1, 1), (2, 2), (4, 3), (3, 4)]  # in tiles, height first
    pinpoints = [[TILE * height, TILE * width] for height, width in shapes]
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=VOCAB[IMAGE],
        video_token_index=VOCAB[VIDEO],
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )
    hf = drawn(LlavaOnevisionForConditionalGeneration, config, seed=4, std=0.15)
    hf.save_pretrained(folder)
    save_processor(folder, "LlavaOnevisionVideoProcessor", "LlavaOnevisionProcessor")
    shared = {"size": {"height": TILE, "width": TILE}}
    shared |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.25, 0.2]}
    images = {"image_processor_type": "LlavaOnevisionImageProcessor"}
    videos = {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": IMAGE,
        "video_token": VIDEO,
        "num_image_tokens": SIDE * SIDE,
        "vision_feature_select_strategy": "full",
    }
    for name, settings in {
        "preprocessor_config.json": shared | images | {"image_grid_pinpoints": pinpoints},
        "video_preprocessor_config.json": shared | videos,
        "processor_config.json": processor,
    }.items():
        (folder / name).write_text(json.dumps(settings))
    return Checkpoint(folder, hf.double(), AutoProcessor.from_pretrained(folder))


@dataclass(frozen=True)
class Ask:
    """A prompt with pictures of some width and height, and films of some frames."""

    prompt: str
    sizes: tuple[tuple[int, int], ...] = ()
    films: tuple[int, ...] = ()

    def data(self) -> dict[str, list]:
        pictures = [picture(sum(size), size) for size in self.sizes]
        films = [
            np.stack([np.asarray(picture(9 * frames + n, (30, 22))) for n in range(frames)])
            for frames in self.films
        ]
        return {name: data for name, data in (("image", pictures), ("video", films)) if data}

    def as_vllm(self) -> dict:
        data = self.data()
        return {"prompt": self.prompt} | ({"multi_modal_data": data} if data else {})


ASKS = (
    Ask(words(3, 70)),
    Ask(f"w1 {IMAGE} w2 w3", ((TILE, TILE),)),
    Ask(f"{IMAGE} w4 w5", ((3 * TILE, 4 * TILE),)),  # 20 x 15 patches, made 17 x 12
    # One above the other, beside one that is unpadded: three shapes of tiles in one request.
    Ask(f"{IMAGE} {words(6, 30)} {IMAGE} {IMAGE} w5", ((2 * TILE, TILE), (18, 45), (70, 40))),
    Ask(f"w7 {IMAGE} w8 {words(9, 45)}", ((300, 1),)),  # no row of its tiles is left
    Ask(f"{VIDEO} w9 {IMAGE} w2 w3 {VIDEO} w1", ((40, 90),), (5, 1)),
)


@torch.no_grad()
def expected(
    checkpoint: Checkpoint, prompt: list[int], made: list[int], ask: Ask, schedule: str
) -> torch.Tensor:
    """Log-probabilities [made, vocabulary], from embeddings laid out by transformers' packing."""
    model, processor = checkpoint.hf.model, checkpoint.image_processor
    boundaries, options = parse(schedule)
    features: dict[str, list[torch.Tensor]] = {"image": [], "video": []}
    torch.set_default_dtype(torch.float64)
    try:
        for image in ask.data().get("image", []):
            inputs = processor.image_processor(images=[image], return_tensors="pt")
            found = model.get_image_features(inputs["pixel_values"].double(), inputs["image_sizes"])
            features["image"] += found.pooler_output
        for frames in ask.data().get("video", []):
            inputs = processor.video_processor(videos=[frames], return_tensors="pt")
            found = model.get_video_features(inputs["pixel_values_videos"].double())
            features["video"] += found.pooler_output
        x, spans, i = model.language_model.embed_tokens(torch.tensor([[*prompt, *made]])), [], 0
        while i < len(prompt):
            modality = next((name for name, pad in PADS.items() if VOCAB[pad] == prompt[i]), None)
            if modality is None:
                i += 1
                continue
            rows = features[modality].pop(0)
            x[0, i : i + len(rows)] = rows
            spans += grids(modality, rows, i, model.image_newline)
            i += len(rows)
        assert not any(features.values())
        logits, _ = decode(checkpoint.hf, x, spans, boundaries, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    return logits[-len(made) - 1 : -1].log_softmax(-1)


def grids(
    modality: str, rows: torch.Tensor, start: int, newline: torch.Tensor
) -> list[list[list[int]]]:
    """Of an item whose features lie at `start`: each grid as rows of tokens, without newlines."""
    ends, tokens = (rows == newline).all(-1).tolist(), list(range(start, start + len(rows)))

    def grid(first: int, side: int) -> list[list[int]]:
        return [tokens[first + r * side : first + (r + 1) * side] for r in range(side)]

    if modality == "video":
        assert ends.index(True) == len(rows) - 1
        return [grid(first, HALF) for first in range(0, len(rows) - 1, HALF * HALF)]
    tiles, row = [], []
    for token, end in zip(tokens[SIDE * SIDE :], ends[SIDE * SIDE :], strict=True):
        if end:
            tiles, row = [*tiles, row], []
        else:
            row.append(token)
    return [grid(0, SIDE), tiles]


def answer_and_check(llm, onevision: Checkpoint, schedule: str) -> list[tuple[int, int]]:
    """Tokens of each prompt, and of those how many came from the prefix cache."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
    outputs = llm.generate([ask.as_vllm() for ask in ASKS], greedy, use_tqdm=False)
    for ask, output in zip(ASKS, outputs, strict=True):
        made = output.outputs[0]
        logprobs = expected(onevision, output.prompt_token_ids, made.token_ids, ask, schedule)
        assert list(made.token_ids) == logprobs.argmax(-1).tolist(), ask
        for row, token, wanted in zip(made.logprobs, made.token_ids, logprobs, strict=True):
            assert abs(row[token].logprob - float(wanted.max())) < 1e-5, ask
    return [(len(output.prompt_token_ids), output.num_cached_tokens) for output in outputs]


def onevision_engine(onevision: Checkpoint, schedule: str, **options):
    limits = {"image": 3, "video": 2}
    defaults = dict(hf_overrides=ARCHITECTURE, limit_mm_per_prompt=limits, block_size=BLOCK)
    return engine(onevision, schedule, max_model_len=1024, **defaults | options)


@pytest.mark.parametrize("schedule", ["1:1/2x1/3,3:1x1/2@grid", "2:1/3@renumber"])
def test_tiles_and_frames(onevision, schedule):
    with onevision_engine(onevision, schedule) as llm:
        answer_and_check(llm, onevision, schedule)
        assert_pool_free(llm)


def test_chunks_and_prefix_hits(onevision):
    """Chunks that cut images, hits behind one and inside it; and what is refused between them."""
    from vllm.exceptions import VLLMValidationError

    schedule = "1:1/3,3:1/2"
    options = dict(enable_prefix_caching=True, max_num_batched_tokens=50, max_num_seqs=4)
    with onevision_engine(onevision, schedule, enable_mm_embeds=True, **options) as llm:
        assert not any(hit for _, hit in answer_and_check(llm, onevision, schedule))
        image, frames = torch.zeros(1, SIDE * SIDE, 64), torch.zeros(1, HALF * HALF + 1, 64)
        pixels = picture(1)
        for prompt, data, reason in (
            (f"w1 {IMAGE} w2", {"image": image}, "images: expected pixels, got embeddings"),
            (f"w1 {VIDEO} w2", {"video": frames}, "videos: expected pixels, got embeddings"),
            (f"w1 {IMAGE}", {"image": pixels}, "expected text behind the last image"),
            (f"w1 {VIDEO}", {"video": Ask("", (), (2,)).data()["video"]}, "expected text behind"),
            ("w1 w2", {"image": pixels}, "expected a place for each image of 1, got 0"),
        ):
            with pytest.raises(VLLMValidationError, match=reason):
                llm.generate({"prompt": prompt, "multi_modal_data": data}, use_tqdm=False)
        for length, hit in answer_and_check(llm, onevision, schedule):
            assert hit == (length - 1) // BLOCK * BLOCK  # as many as in stock vLLM
        assert_pool_free(llm)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            {"vision_feature_select_strategy": "default"},
            "vision_feature_select_strategy 'default': expected 'full'",
        ),
        (
            {"architectures": ["AdscLlavaNextForConditionalGeneration"]},
            "text model 'qwen2': expected llama; vision tower 'siglip_vision_model'",
        ),
    ],
)
def test_refused(onevision, overrides, reason):
    options = dict(hf_overrides=ARCHITECTURE | overrides)
    with pytest.raises(ValueError, match=reason), onevision_engine(onevision, "1:1/3", **options):
        pass
