"""A slow LLaVA under compression, to test the thin one against.

Made of transformers' own decoder layers, one sequence at a time, without a cache: at a boundary it
writes down the survivors as a plain list of indices and indexes with it. The keep rule is written
here once more, from its definition; nothing of ours is imported.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

Share = Fraction | tuple[Fraction, Fraction]  # tuple: rows and columns, for the grid


def kept(pattern: str, n: int, keep: Fraction) -> list[int]:
    """The kept indices of 0 .. n - 1."""
    m = math.ceil(n * keep)
    if pattern == "start":
        return [j * n // m for j in range(m)]
    if pattern == "center":
        return [(2 * j + 1) * n // (2 * m) for j in range(m)]
    if m == 1:
        return [0]
    return [math.floor(Fraction(j * (n - 1), m - 1) + Fraction(1, 2)) for j in range(m)]


def thin(span: list[list[int]], pattern: str, keep: Share) -> list[list[int]]:
    """What is left of an image, given as rows of token indices (one long row but for the grid)."""
    if isinstance(keep, tuple):
        rows = [span[i] for i in kept("start", len(span), keep[0])]
        columns = kept("start", len(rows[0]) if rows else 0, keep[1])
        return [[row[i] for i in columns] for row in rows]
    flat = [i for row in span for i in row]
    return [[flat[i] for i in kept(pattern, len(flat), keep)]]


@torch.no_grad()
def oracle(
    hf,
    ids: list[int],
    spans: list[tuple[int, int, int]],
    pixels: Tensor | None,
    boundaries: dict[int, Share],
    pattern: str = "start",
    positions: str = "original",
    lost: dict[int, dict[int, int]] | None = None,
) -> tuple[Tensor, list[list[int]]]:
    """Logits of the rows that reach the head, and the surviving token indices of every stage.

    spans: (start, height, width) of each image in ids. boundaries: layer -> share to keep.
    lost: layer -> token -> the first token after it that doesn't see it in that layer any more.
    """
    llama = hf.model.language_model
    x = llama.embed_tokens(torch.tensor([ids]))
    images = []
    if spans:
        features = hf.model.get_image_features(pixel_values=pixels).pooler_output
        for (start, height, width), rows in zip(spans, features, strict=True):
            x[0, start : start + height * width] = rows
            tokens = list(range(start, start + height * width))
            images.append([tokens[r * width : (r + 1) * width] for r in range(height)])
    return decode(hf, x, images, boundaries, pattern, positions, lost)


@torch.no_grad()
def decode(
    hf,
    x: Tensor,
    images: list[list[list[int]]],
    boundaries: dict[int, Share],
    pattern: str = "start",
    positions: str = "original",
    lost: dict[int, dict[int, int]] | None = None,
    rope: Tensor | None = None,
) -> tuple[Tensor, list[list[int]]]:
    """The same from embeddings [1, T, hidden]; images: for each its rows of token indices.

    rope: [3, T], for M-RoPE: in place of the tokens' numbers.
    """
    llama = hf.model.language_model
    vision = {i for image in images for row in image for i in row}
    text = [i for i in range(x.shape[1]) if i not in vision]
    alive = list(range(x.shape[1]))
    stages = [alive]
    for n, layer in enumerate(llama.layers):
        if n in boundaries:
            images = [thin(image, pattern, boundaries[n]) for image in images]
            left = sorted(text + [i for image in images for row in image for i in row])
            x = x[:, [alive.index(i) for i in left]]
            alive = left
            stages.append(alive)
        where = alive if positions == "original" else list(range(len(alive)))
        mask = torch.full((len(alive), len(alive)), -torch.inf).triu(1)[None, None]
        for key, query in (lost or {}).get(n, {}).items():
            if key in alive:
                late = torch.tensor([token >= query for token in alive])
                mask[0, 0, late, alive.index(key)] = -torch.inf
        position_ids = torch.tensor([where]) if rope is None else rope[:, None, alive]
        out = layer(
            x,
            attention_mask=mask,
            position_ids=position_ids,
            position_embeddings=llama.rotary_emb(x, position_ids),
        )
        x = out[0] if isinstance(out, tuple) else out
    return hf.lm_head(llama.norm(x))[0], stages
