"""Questions with their answers as one packed batch, and the rows that predict the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from PIL.Image import Image
from torch import Tensor

from adsc_kernels.llava import Llava


@dataclass(frozen=True)
class Batch:
    """Prompt and answer of each sequence, with a picture in it; a picture is encoded once.

    Attributes:
        tokens: of prompt and answer, the picture expanded to its rows.
        starts: where the picture begins in each sequence.
        prompt_lens: tokens before each answer; the last of them predicts the answer's first.
        pixels: [P, 3, S, S], each picture once.
        pictures: which of them each sequence has.
        numbers: of the questions in their data, for what is drawn at random.
    """

    tokens: list[list[int]]
    starts: list[int]
    prompt_lens: list[int]
    pixels: Tensor
    pictures: list[int]
    numbers: list[int]

    @property
    def lens(self) -> list[int]:
        """Rows of each sequence."""
        return [len(ids) for ids in self.tokens]


def encode(
    model: Llava,
    prompts: Sequence[str],
    answers: Sequence[str],
    images: Sequence[Image],
    numbers: Sequence[int],
) -> Batch:
    """Raises ValueError where a prompt's tokens are others with its answer behind it."""
    tokens, starts, lens = [], [], []
    for number, prompt, answer in zip(numbers, prompts, answers, strict=True):
        before, (start,) = model.processor.encode(prompt, 1, begins=True)
        whole, _ = model.processor.encode(f"{prompt} {answer}", 1, begins=True)
        if whole[: len(before)] != before or len(whole) == len(before):
            raise ValueError(f"question {number}: expected tokens of its own for the answer")
        tokens.append(whole)
        starts.append(start)
        lens.append(len(before))
    once = list({id(image): image for image in images}.values())
    places = {id(image): n for n, image in enumerate(once)}
    pixels = model.processor.pixels(once).to(model.device)
    return Batch(tokens, starts, lens, pixels, [places[id(i)] for i in images], list(numbers))


def embed(model: Llava, batch: Batch, features: Tensor | None = None) -> Tensor:
    """Rows of all sequences, [T, hidden]; features: [P, rows, hidden], None means the model's."""
    features = model.image_features(batch.pixels) if features is None else features
    ids = torch.tensor([token for sequence in batch.tokens for token in sequence])
    x = model.language_model.embed_tokens(ids.to(model.device))
    firsts = [0, *accumulate(batch.lens)]
    for b, (start, picture) in enumerate(zip(batch.starts, batch.pictures, strict=True)):
        begin = firsts[b] + start
        x[begin : begin + features.shape[1]] = features[picture]
    return x


def answered(model: Llava, batch: Batch, hidden: Tensor, lens: Sequence[int]) -> list[bool]:
    """Which answers greedy decoding would give word for word, by one pass over prompt and answer.

    hidden: [sum(lens), hidden], each sequence's rows of the last stage. Decoding gives the answer
    exactly if each of its tokens, and a stop token behind it, is the likeliest after those before.
    """
    sizes = [n - prompt for n, prompt in zip(batch.lens, batch.prompt_lens, strict=True)]
    ends = list(accumulate(lens))
    rows = [row for end, n in zip(ends, sizes, strict=True) for row in range(end - n - 1, end)]
    likeliest = model.logits(hidden[torch.tensor(rows, device=hidden.device)]).argmax(-1).tolist()
    right, at = [], 0
    for ids, n in zip(batch.tokens, sizes, strict=True):
        *said, stop = likeliest[at : at + n + 1]
        right.append(said == ids[-n:] and stop in model.config.stop_token_ids)
        at += n + 1
    return right
