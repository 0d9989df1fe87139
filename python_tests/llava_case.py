"""Batches of prompts for the LLaVA tests, and ways to run them."""

from __future__ import annotations

from fractions import Fraction

import torch
from llava_oracle import Share, oracle
from tiny_checkpoints import picture
from torch import Tensor

from adsc_kernels.cache import Phase
from adsc_kernels.llava import Llava
from adsc_kernels.llava.generate import Conversation, read_turn, run

# One image, several, none, two side by side, one at the very beginning; all of different lengths.
PROMPTS = [
    "w1 w2 <image> w3",
    "<image> w6 w7 <image> w8 w9 w10",
    "w4 w5",
    "w11 <image> <image> w12 w13",
]
IMAGES = [[picture(1)], [picture(2), picture(3)], [], [picture(4, (30, 20)), picture(5, (17, 40))]]
SECOND = ["w20 <image> w21", "w22", "w23 <image> w24 w25", "w26 w27 <image> w28"]
SECOND_IMAGES = [[picture(6)], [], [picture(7)], [picture(8)]]


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def begin(
    model: Llava,
    prompts: list[str] = PROMPTS,
    images: list = IMAGES,
    earlier: Conversation | None = None,
) -> tuple[Conversation, list]:
    """A conversation whose turn is read but not run, and the turn's pictures for `run`."""
    talk, pixels, spans = read_turn(model, prompts, images, 1, earlier)
    features = model.image_features(pixels) if spans else []
    return talk, list(zip(spans, features, strict=True))


@torch.no_grad()
def run_to(
    model: Llava, talk: Conversation, ends: list[int], phase: Phase, pictures
) -> list[Tensor]:
    """Run up to `ends`; logits of every row of the last stage, by sequence."""
    from adsc_kernels.plan import make_plan

    offsets = [0]
    for tokens in talk.tokens:
        offsets.append(offsets[-1] + len(tokens))
    chunks = list(zip(talk.cached, ends, strict=True))
    plan = make_plan(model.schedule, offsets, talk.vision_spans, chunks=chunks)
    talk.cache.fit(plan)
    hidden = run(model, talk, ends, phase, pictures, all_rows=True)
    return list(model.logits(hidden).split(plan.stages[-1].seq_lens))


def run_whole(model: Llava, prompts: list[str] = PROMPTS, images: list = IMAGES) -> list[Tensor]:
    talk, pictures = begin(model, prompts, images)
    return run_to(model, talk, [len(t) for t in talk.tokens], Phase.PREFILL, pictures)


def expected(
    hf, model: Llava, talk: Conversation, images: list, boundaries: dict[int, Share]
) -> list[Tensor]:
    """The oracle's logits of each sequence of a conversation, whole."""
    schedule = model.schedule
    return [
        oracle(
            hf,
            tokens,
            [(start, h, w) for b, start, _, h, w in talk.vision_spans if b == sequence],
            model.processor.pixels(images[sequence]),
            boundaries,
            schedule.pattern,
            schedule.positions,
        )[0]
        for sequence, tokens in enumerate(talk.tokens)
    ]


def shares(model: Llava) -> dict[int, Share]:
    """A schedule's boundaries as the oracle takes them: plain fractions."""
    found: dict[int, Share] = {}
    for boundary in model.schedule.boundaries:
        rows, columns = boundary.keep_rows, boundary.keep_columns
        grid = rows is not None and columns is not None
        found[boundary.layer] = (Fraction(rows), Fraction(columns)) if grid else boundary.keep
    return found
