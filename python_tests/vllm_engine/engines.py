"""Running requests through an engine, and checking every answer against the oracle."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from llava_oracle import Share, oracle
from PIL import Image
from tiny_checkpoints import IMAGE_ID, make_checkpoint, picture

BLOCK = 32
GRID = 8
IMAGE_TOKENS = GRID * GRID


def drawn(kind: Any, config: Any, seed: int, std: float) -> Any:
    """A transformers model with random weights that tell tokens apart."""
    torch.manual_seed(seed)
    hf = kind(config).eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            weight.normal_(std=0.6 if "embed_tokens" in name else std)
            if "norm" in name or "ln_q" in name:
                weight.add_(1)
    return hf


@dataclass
class Checkpoint:
    folder: Path
    hf: Any
    image_processor: Any

    @classmethod
    def make(cls, folder: Path, **options: Any) -> Checkpoint:
        from transformers import AutoImageProcessor

        sizes: dict[str, Any] = dict(layers=6, heads=4, kv_heads=2, head_dim=32, grid=GRID)
        sizes["max_positions"] = 4096
        sizes["names"] = "4-nested"  # the only ones that vLLM's own LLaVA reads
        hf = make_checkpoint(folder, **sizes | options)
        processor = {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": 4,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        }
        (folder / "processor_config.json").write_text(json.dumps(processor))
        # In float64, so that what differs is the engine's rounding alone.
        return cls(folder, hf.double(), AutoImageProcessor.from_pretrained(folder))


@dataclass(frozen=True)
class Ask:
    """A prompt with the seeds of its pictures."""

    prompt: str
    seeds: tuple[int, ...] = ()

    def images(self) -> list[Image.Image]:
        return [picture(seed) for seed in self.seeds]

    def as_vllm(self) -> dict[str, Any]:
        request: dict[str, Any] = {"prompt": self.prompt}
        if self.seeds:
            request["multi_modal_data"] = {"image": self.images()}
        return request


def words(first: int, count: int) -> str:
    return " ".join(f"w{(first + n) % 40}" for n in range(count))


# An image first, in the middle, two, two side by side, none; short and longer than a block.
MIXED = (
    Ask("<image> w3 w4", (1,)),
    Ask(f"{words(5, 40)} <image> {words(9, 50)}", (2,)),
    Ask("w1 <image> w6 w7 <image> w8 w9 w10", (3, 1)),
    Ask(words(11, 70)),
    Ask("w11 <image> <image> w12 w13", (4, 5)),
)


def arguments(checkpoint: Checkpoint, schedule: str | None, **options: Any) -> dict[str, Any]:
    """Of a small engine; schedule None is vLLM's own LLaVA."""
    if schedule is not None:
        options.setdefault("hf_overrides", {"architectures": ["AdscLlavaForConditionalGeneration"]})
        options["additional_config"] = {
            "adsc_schedule": schedule,
            **options.get("additional_config", {}),
        }
    defaults: dict[str, Any] = dict(
        model=str(checkpoint.folder),
        dtype="float32",
        block_size=BLOCK,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        num_gpu_blocks_override=240,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 4},
        disable_log_stats=False,
    )
    return defaults | options


@contextmanager
def engine(checkpoint: Checkpoint, schedule: str | None, **options: Any) -> Iterator[Any]:
    """An LLM in this process unless told otherwise."""
    from vllm import LLM

    llm = LLM(**arguments(checkpoint, schedule, **options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def scheduler_of(llm: Any) -> Any:
    """Of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def answer(llm: Any, asks: Sequence[Ask], max_tokens: int = 10) -> list[Any]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=1, ignore_eos=True)
    return llm.generate([ask.as_vllm() for ask in asks], greedy, use_tqdm=False)


def parse(schedule: str) -> tuple[dict[int, Share], dict[str, str]]:
    """A schedule's boundaries and options for the oracle, read without the library."""
    text, *options = schedule.split("@")
    boundaries: dict[int, Share] = {}
    for part in text.split(",") if text else ():
        layer, share = part.split(":")
        rows, _, columns = share.partition("x")
        boundaries[int(layer)] = (Fraction(rows), Fraction(columns)) if columns else Fraction(rows)
    named = {}
    for option in options:
        named["positions" if option == "renumber" else "pattern"] = option
    return boundaries, named


def check(
    checkpoint: Checkpoint, schedule: str, asks: Sequence[Ask], outputs: Sequence[Any]
) -> None:
    """Every token is the oracle's likeliest, and its log-probability the oracle's: within 1e-5. In
    long answers some token is so sensitive that transformers' layers in float32 pass that too: then
    within 2e-5, and all together at most twice as far off as those (root mean square)."""
    assert len(asks) == len(outputs)
    exact, errors = [], []
    for ask, output in zip(asks, outputs, strict=True):
        made = output.outputs[0]
        best, likeliest = expected(checkpoint.hf, checkpoint, schedule, ask, output).max(-1)
        assert made.token_ids == likeliest.tolist(), ask
        got = [row[token].logprob for row, token in zip(made.logprobs, made.token_ids, strict=True)]
        exact.append((best, likeliest[:, None]))
        errors.append(torch.tensor(got) - best)
    error = torch.cat(errors)
    worst = float(error.abs().max())
    assert worst <= 2e-5, worst
    if worst <= 1e-5:
        return
    single, own = copy.deepcopy(checkpoint.hf).float(), 0.0
    for attention in ("sdpa", "eager"):
        single.set_attn_implementation(attention)
        errors = [
            expected(single, checkpoint, schedule, ask, output).gather(1, likeliest)[:, 0] - best
            for ask, output, (best, likeliest) in zip(asks, outputs, exact, strict=True)
        ]
        own = max(own, float(torch.cat(errors).square().mean().sqrt()))
    assert float(error.square().mean().sqrt()) <= 2 * own, (worst, own)


def expected(hf: Any, checkpoint: Checkpoint, schedule: str, ask: Ask, output: Any) -> torch.Tensor:
    """The oracle's log-probabilities [answer, vocabulary], in hf's precision, where an answer's
    tokens were chosen."""
    boundaries, options = parse(schedule)
    prompt, made = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
    spans, i = [], 0
    while i < len(prompt):
        inside = prompt[i] == IMAGE_ID
        spans += [(i, GRID, GRID)] * inside
        i += IMAGE_TOKENS if inside else 1
    assert len(spans) == len(ask.seeds)
    pixels = None
    if ask.seeds:
        images = checkpoint.image_processor(images=ask.images(), return_tensors="pt")
        pixels = images["pixel_values"].to(hf.dtype)
    torch.set_default_dtype(hf.dtype)
    try:
        logits, _ = oracle(hf, prompt + made, spans, pixels, boundaries, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    return logits.log_softmax(-1)[-len(made) - 1 : -1]


def run(
    checkpoint: Checkpoint,
    schedule: str,
    asks: Sequence[Ask] = MIXED,
    max_tokens: int = 10,
    **options: Any,
) -> None:
    """Answer, check, and see the pool free again."""
    with engine(checkpoint, schedule, **options) as llm:
        check(checkpoint, schedule, asks, answer(llm, asks, max_tokens))
        assert_pool_free(llm)


def assert_pool_free(llm: Any) -> None:
    """All blocks but the null block are free."""
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
