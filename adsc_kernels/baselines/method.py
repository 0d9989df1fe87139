"""What a method is: where it drops or merges vision tokens, and how many each layer processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from adsc_kernels.baselines.batch import Batch, embed
from adsc_kernels.baselines.decoder import Rows, Select, run
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.llava import Llava, LlavaConfig


class Method(ABC):
    """A way of answering with fewer vision tokens. `tokens`: of a picture, in each layer."""

    tokens: list[int]

    @property
    def average(self) -> Fraction:
        """Vision tokens that a layer processes on average: those that come into it."""
        return Fraction(sum(self.tokens), len(self.tokens))

    @abstractmethod
    def hidden(self, model: Llava, batch: Batch) -> tuple[Tensor, Sequence[int]]:
        """Hidden rows of the last layer, packed, and how many each sequence has."""


class InDecoder(Method):
    """Drops inside the decoder, with all positions as they were."""

    @abstractmethod
    def selector(self, x: Tensor, rows: Rows, batch: Batch) -> Select:
        """What a batch's layers drop; x: the rows [T, hidden] that come into layer 0."""

    def hidden(self, model: Llava, batch: Batch) -> tuple[Tensor, Sequence[int]]:
        """As `Method.hidden`."""
        size = model.config.tokens_per_image
        x = embed(model, batch)
        positions = torch.cat([torch.arange(n) for n in batch.lens]).to(x.device)
        spans = tuple((start, start + size) for start in batch.starts)
        rows = Rows(positions, tuple(batch.lens), spans, tuple(batch.prompt_lens))
        out, left = run(model, x, rows, self.selector(x, rows, batch))
        return out, left.seq_lens


class BeforeDecoder(Method):
    """Gives the decoder fewer rows of each picture from the start."""

    @abstractmethod
    def pictures(self, model: Llava, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [P, m, hidden] of pixels [P, 3, S, S], and the position of each in its picture,
        int64 [P, m]: m gives what follows the position of its true place, 0..m-1 in a picture of m
        rows that of one behind another.
        """

    renumber = False  # what follows the picture goes on from its m rows, not from all it had

    def hidden(self, model: Llava, batch: Batch) -> tuple[Tensor, Sequence[int]]:
        """As `Method.hidden`."""
        rows, places = self.pictures(model, batch.pixels)
        size, left = model.config.tokens_per_image, rows.shape[1]
        parts, positions, lens = [], [], []
        for ids, start, picture in zip(batch.tokens, batch.starts, batch.pictures, strict=True):
            text = torch.tensor(ids[:start] + ids[start + size :], device=rows.device)
            head, tail = model.language_model.embed_tokens(text).tensor_split([start])
            parts += [head, rows[picture], tail]
            behind = start + (left if self.renumber else size)
            at = torch.arange(len(text) - start, device=rows.device) + behind
            positions += [torch.arange(start, device=rows.device), start + places[picture], at]
            lens.append(len(text) + left)
        spans = tuple((start, start + left) for start in batch.starts)
        packed = Rows(torch.cat(positions), tuple(lens), spans, tuple(0 for _ in lens))
        out, _ = run(model, torch.cat(parts), packed)
        return out, lens


def near_square(count: int) -> tuple[int, int]:
    """The rows and columns of a grid of exactly so many, as near to a square as can be."""
    rows = max(n for n in range(1, int(count**0.5) + 1) if count % n == 0)
    return rows, count // rows


def centers(model: Llava, height: int, width: int) -> Tensor:
    """The patch in the middle of each cell of a height x width raster over the picture, int64."""
    side = model.config.grid
    at = [((2 * torch.arange(n) + 1) * side) // (2 * n) for n in (height, width)]
    return (at[0][:, None] * side + at[1]).flatten().to(model.device)


def whole_layers_first(name: str, config: LlavaConfig, budget: int, whole: int) -> int:
    """Tokens left for the layers behind the first `whole`, by a budget for the average of all."""
    left = budget * config.num_layers - whole * config.tokens_per_image
    if left <= 0:
        least = Fraction(whole * config.tokens_per_image, config.num_layers)
        raise UnsupportedError(
            f"{name}: expected a budget above {float(least):g}, which its first {whole} layers "
            f"take by themselves, got {budget}"
        )
    return left


def stages(boundaries: Sequence[int], counts: Sequence[int], layers: int) -> list[int]:
    """Tokens in each layer: counts[0] up to the first boundary, counts[1] from there on, ..."""
    edges = [0, *boundaries, layers]
    sizes = [end - begin for begin, end in pairwise(edges)]
    return [n for n, size in zip(counts, sizes, strict=True) for _ in range(size)]


def strongest(scores: Tensor, count: int) -> Tensor:
    """Where the `count` highest scores are, rising."""
    return scores.topk(min(count, len(scores))).indices.sort().values
