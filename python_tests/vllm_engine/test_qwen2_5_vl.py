"""Qwen2.5-VL: images and videos of any size, M-RoPE, a Qwen2 decoder, against the oracle."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import BLOCK, Checkpoint, assert_pool_free, drawn, engine, parse, words
from llava_oracle import decode
from tiny_checkpoints import WORDS, picture
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from adsc_kernels import CompressionSchedule, make_plan
from adsc_kernels.integrations.vllm.model import gather

SPECIAL = ["<unk>", "<s>", "</s>", "<|vision_start|>", "<|vision_end|>"]
PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
VOCAB = {word: n for n, word in enumerate([*SPECIAL, *PADS.values(), *WORDS])}
PAD_IDS = {VOCAB[pad]: modality for modality, pad in PADS.items()}
TOKEN = 8  # pixels along each side of a vision token: 2 x 2 patches of 4 x 4
FPS, TOKENS_PER_SECOND = 2.0, 3
ARCHITECTURE = {"architectures": ["AdscQwen2_5_VLForConditionalGeneration"]}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(VOCAB) + 4,
            hidden_size=64,
            intermediate_size=48,
            num_hidden_layers=5,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=2048,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6]),
            bos_token_id=VOCAB["<s>"],
            eos_token_id=None,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            patch_size=TOKEN // 2,
            window_size=2 * TOKEN,
            out_hidden_size=64,
            fullatt_block_indexes=[1],
            tokens_per_second=TOKENS_PER_SECOND,
        ),
        image_token_id=VOCAB[PADS["image"]],
        video_token_id=VOCAB[PADS["video"]],
        vision_start_token_id=VOCAB["<|vision_start|>"],
        vision_end_token_id=VOCAB["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    hf = drawn(Qwen2_5_VLForConditionalGeneration, config, seed=2, std=0.15)
    hf.save_pretrained(folder)
    save_processor(folder, "Qwen2VLVideoProcessor", "Qwen2_5_VLProcessor")
    return Checkpoint(folder, hf.double(), AutoProcessor.from_pretrained(folder))


def save_processor(folder: Path, video: str, processor: str) -> None:
    inner = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", VOCAB["<s>"])]
    )
    inner.add_special_tokens([*SPECIAL, *PADS.values()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": TOKEN**2, "longest_edge": 128 * TOKEN**2}
    shared = {"size": size, "patch_size": TOKEN // 2, "merge_size": 2, "temporal_patch_size": 2}
    shared |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.25, 0.2]}  # vLLM wants them
    for name, settings in {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": {"video_processor_type": video},
        "processor_config.json": {"processor_class": processor},
    }.items():
        settings |= {} if name.startswith("processor") else shared
        (folder / name).write_text(json.dumps(settings))


def film(seed: int, frames: int, size: tuple[int, int]) -> tuple[np.ndarray, dict]:
    """Frames [frames, height, width, 3], and what vLLM wants to know of them."""
    pixels = np.stack([np.asarray(picture(seed + n, size)) for n in range(frames)])
    about = dict(fps=FPS, duration=frames / FPS, total_num_frames=frames)
    return pixels, about | dict(frames_indices=list(range(frames)), do_sample_frames=False)


@dataclass(frozen=True)
class Ask:
    """A prompt with pictures (seed, width and height in tokens) and films (and frames)."""

    prompt: str
    pictures: tuple[tuple[int, int, int], ...] = ()
    films: tuple[tuple[int, int, int, int], ...] = ()

    def data(self) -> dict[str, list]:
        pictures = [picture(seed, (w * TOKEN, h * TOKEN)) for seed, w, h in self.pictures]
        films = [film(seed, n, (w * TOKEN, h * TOKEN)) for seed, w, h, n in self.films]
        return {name: data for name, data in (("image", pictures), ("video", films)) if data}

    def as_vllm(self) -> dict:
        data = self.data()
        return {"prompt": self.prompt} | ({"multi_modal_data": data} if data else {})


IMAGE, FILM = (f"<|vision_start|> {pad} <|vision_end|>" for pad in PADS.values())
ASKS = (
    Ask(words(3, 70)),
    Ask(f"{IMAGE} w1 w2", ((1, 7, 5),)),
    Ask(f"w1 {IMAGE} {words(6, 30)} {IMAGE} w5 w6", ((2, 3, 9), (3, 11, 1))),
    Ask(f"w4 {PADS['image']} {PADS['image']} w8 {words(9, 45)}", ((4, 16, 8), (1, 1, 1))),
    Ask(f"{FILM} w9 {IMAGE} w2 w3", ((5, 4, 4),), ((6, 5, 3, 6),)),
)


def positions(kinds: list[str | None], grids: dict[str, list]) -> tuple[torch.Tensor, list]:
    """[3, T] of M-RoPE by its definition, and each image and frame as rows of token indices.

    kinds: "image", "video" or None for each token. grids: of each, (frames, height, width) in
    tokens, in the order of the prompt.
    """
    frames: list[list[list[int]]] = []
    found: list[tuple[int, int, int]] = []
    while (i := len(found)) < len(kinds):
        at = max(map(max, found), default=-1) + 1
        modality = kinds[i]
        if modality is None:
            found.append((at, at, at))
            continue
        time, height, width = grids[modality].pop(0)
        step = TOKENS_PER_SECOND * 2 / FPS if modality == "video" else 1
        for t in range(time):
            rows = [
                range(len(found) + r * width, len(found) + (r + 1) * width) for r in range(height)
            ]
            frames.append([list(row) for row in rows])
            found += [
                (at + int(t * step), at + r, at + c) for r in range(height) for c in range(width)
            ]
    assert not any(grids.values())
    return torch.tensor(found).T, frames


@contextmanager
def adding(layers, added: list[torch.Tensor]):
    """To what each of the first layers returns."""
    hooks = [
        layer.register_forward_hook(lambda layer, args, out, rows=rows: out + rows)
        for layer, rows in zip(layers, added, strict=False)
    ]
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def expected(
    checkpoint: Checkpoint, prompt: list[int], made: list[int], ask: Ask, schedule: str
) -> torch.Tensor:
    """Log-probabilities [made, vocabulary] by transformers' tower and layers in float64."""
    # A pad that the model itself writes is text.
    ids, kinds = [*prompt, *made], [PAD_IDS.get(token) for token in prompt] + [None] * len(made)
    model, processor = checkpoint.hf.model, checkpoint.image_processor
    boundaries, options = parse(schedule)
    torch.set_default_dtype(torch.float64)
    try:
        x, grids = model.language_model.embed_tokens(torch.tensor([ids])), {}
        added: list[torch.Tensor] = []  # Qwen3-VL's, behind each of the first layers
        for name, items in ask.data().items():
            if name == "image":
                inputs = processor.image_processor(images=items, return_tensors="pt")
                pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
                made_of_it = model.get_image_features(pixels.double(), grid)
            else:
                films = [torch.from_numpy(pixels).movedim(-1, 1) for pixels, _ in items]
                inputs = processor.video_processor(
                    videos=films, do_sample_frames=False, return_tensors="pt"
                )
                pixels, grid = inputs["pixel_values_videos"], inputs["video_grid_thw"]
                made_of_it = model.get_video_features(pixels.double(), grid)
            where = [kind == name for kind in kinds]
            x[0, where] = torch.cat(list(made_of_it.pooler_output))
            levels = getattr(made_of_it, "deepstack_features", ())
            added = added or [torch.zeros_like(x) for _ in levels]
            for level, rows in zip(added, levels, strict=True):
                level[0, where] = torch.cat(rows)
            # Between a video's frames Qwen3-VL has their times: each is an image then.
            grids[name] = [
                grid
                for t, h, w in grid.tolist()
                for grid in ([(1, h // 2, w // 2)] * t if levels else [(t, h // 2, w // 2)])
            ]
        rope, frames = positions(kinds, grids)
        with adding(model.language_model.layers, added):
            logits, _ = decode(checkpoint.hf, x, frames, boundaries, **options, rope=rope)
    finally:
        torch.set_default_dtype(torch.float32)
    return logits[-len(made) - 1 : -1].log_softmax(-1)


def answer_and_check(llm, qwen: Checkpoint, schedule: str, asks=ASKS) -> list[int]:
    """Tokens of each prompt that came from the prefix cache."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
    outputs = llm.generate([ask.as_vllm() for ask in asks], greedy, use_tqdm=False)
    for ask, output in zip(asks, outputs, strict=True):
        made = output.outputs[0]
        logprobs = expected(qwen, output.prompt_token_ids, made.token_ids, ask, schedule)
        assert list(made.token_ids) == logprobs.argmax(-1).tolist(), ask
        for row, token, wanted in zip(made.logprobs, made.token_ids, logprobs, strict=True):
            assert abs(row[token].logprob - float(wanted.max())) < 1e-5, ask
    return [output.num_cached_tokens for output in outputs]


def qwen_engine(qwen: Checkpoint, schedule: str, **options):
    limits = {"image": 2, "video": 1}
    defaults = dict(hf_overrides=ARCHITECTURE, limit_mm_per_prompt=limits, block_size=BLOCK)
    return engine(qwen, schedule, **defaults | options)


def test_grids_of_any_size(qwen):
    """By height and width: either taken for the other would drop other tokens."""
    schedule = "1:1/2x1/3,3:1x1/2@grid"
    with qwen_engine(qwen, schedule) as llm:
        answer_and_check(llm, qwen, schedule)
        assert_pool_free(llm)


def test_chunks_and_prefix_hits(qwen):
    """Chunks that cut images, and hits behind one: its data is then not sent to the worker."""
    from vllm.exceptions import VLLMValidationError

    schedule = "1:1/2,3:1/2"  # of 128 tokens 64 and 96 are dropped, whole blocks
    options = dict(enable_prefix_caching=True, max_num_batched_tokens=50, max_num_seqs=4)
    with qwen_engine(qwen, schedule, **options) as llm:
        assert not any(answer_and_check(llm, qwen, schedule))
        hits = answer_and_check(llm, qwen, schedule)
        assert (hits[0], hits[3]) == (2 * BLOCK, 5 * BLOCK)
        last = (Ask("w1 <|image_pad|>", ((1, 2, 2),)), Ask("<|video_pad|>", (), ((1, 2, 2, 2),)))
        for ask in last:
            with pytest.raises(VLLMValidationError, match="expected text behind the last image"):
                llm.generate(ask.as_vllm())
        assert_pool_free(llm)


def test_separate_process(qwen, monkeypatch):
    """Where an image that comes again is sent by name, without its data."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    schedule = "2:1/2x1/3@grid"
    with qwen_engine(qwen, schedule) as llm:
        for asks in (ASKS, ASKS[1:]):
            answer_and_check(llm, qwen, schedule, asks)


def test_gather():
    """Positions move with their rows, and lie in memory as before."""
    schedule = CompressionSchedule.parse("1:1/3", 2)
    stage = make_plan(schedule, [0, 12], [(0, 2, 9)]).stages[1]
    hidden, everything = torch.randn(14, 4), torch.arange(3 * 20).view(3, 20)
    kept = stage.keep_indices()
    for residual in (None, torch.randn(14, 4)):
        for positions in (everything[0, :14], everything[:, :14]):
            got, moved, rest = gather(hidden, positions, residual, stage)
            assert torch.equal(got, hidden[kept])
            assert torch.equal(moved, positions[..., kept])
            assert moved.stride() == positions.stride()
            assert rest is None if residual is None else torch.equal(rest, residual[kept])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(additional_config={"adsc_schedule": "1:1/3@renumber"}), "with M-RoPE"),
        (dict(mm_processor_cache_type="shm"), "mm_processor_cache_type 'shm'"),
        (dict(video_pruning_rate=0.5), "video pruning"),
        (
            dict(hf_overrides={"architectures": ["AdscLlavaForConditionalGeneration"]}),
            "text model 'qwen2_5_vl_text': expected llama",
        ),
    ],
)
def test_refused(qwen, options, reason):
    with pytest.raises(ValueError, match=reason), qwen_engine(qwen, "1:1/3", **options):
        pass
