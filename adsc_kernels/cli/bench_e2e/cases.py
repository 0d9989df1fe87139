"""What `adsc bench e2e` measures: shapes of decoders, ways of answering, cases of them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from adsc_kernels.accounting import MODELS, ModelShape
from adsc_kernels.budget import PRESETS, search
from adsc_kernels.schedule import CompressionSchedule

TEXT = (35, 66)  # tokens in front of the picture and behind it
PICTURE = 576  # tokens that schedules are named by
SHAPES = {
    "tiny": ModelShape(4, 64, 4, 2, 16, 128, 256),
    "llama-3-8b": ModelShape(32, 4096, 32, 8, 128, 14336, 128256),
    **{name: MODELS[name] for name in ("llava-1.5-7b", "llava-1.5-13b", "qwen2.5-vl-7b")},
}
# How a picture's tokens become fewer; of a schedule its name stands for it.
FEWER = ("dense", "192", "128", "64", "before", "smaller")
OTHERS = ("transformers", "fastv", "pyramid_drop")
WAYS = (*FEWER, *OTHERS)


@dataclass(frozen=True)
class Case:
    """Prompts of one picture each, and answers.

    ways: which of WAYS. memory: bytes in which the batch shall be the largest that fits, and then
    only steps of decode are measured; None takes `batch`.
    """

    vision: int
    new_tokens: int
    ways: tuple[str, ...] = WAYS
    batch: int = 1
    memory: int | None = None

    @property
    def length(self) -> int:
        """Tokens of a prompt."""
        return sum(TEXT) + self.vision


GIB = 2**30
# The most telling first; about two minutes of an H200 in LLaVA-1.5-7B's shape.
HEADLINE = (
    Case(PICTURE, 32, batch=1),
    Case(PICTURE, 32, batch=8),
    Case(PICTURE, 32, ("dense", "192", "64", "transformers"), batch=32),
    Case(5 * PICTURE, 32, ("dense", "192"), batch=16),
    Case(PICTURE, 32, ("dense", "192"), memory=70 * GIB),
    Case(5 * PICTURE, 32, ("dense", "192"), memory=70 * GIB),
)


def schedules_of(depth: int) -> dict[str, CompressionSchedule]:
    """By the average of 576 tokens that layers process; too few layers have one for all names."""
    known = {preset.rpartition("/")[2]: preset for preset, (n, _) in PRESETS.items() if n == depth}
    return {
        name: CompressionSchedule.preset(known[name]) if name in known else _searched(name, depth)
        for name in ("192", "128", "64")
    }


def _searched(name: str, depth: int) -> CompressionSchedule:
    try:
        return search(int(name), PICTURE, depth, 2).schedules[0]
    except ValueError:  # no boundaries in so few layers reach it
        text = ",".join(f"{depth * quarter // 4}:1/4" for quarter in (1, 2, 3))
        return CompressionSchedule.parse(text, num_layers=depth)


def tokens_by_layer(schedule: CompressionSchedule, vision: int) -> list[int]:
    """Vision tokens that each layer processes."""
    kept = schedule.kept(vision)
    return [kept[schedule.stage_of_layer(layer)] for layer in range(schedule.num_layers)]


def average(tokens: list[int]) -> int:
    """As whole tokens, at least one: what the ways that keep as many everywhere get."""
    return max(round(Fraction(sum(tokens), len(tokens))), 1)
