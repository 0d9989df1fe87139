"""What a compressed model computes, slowly: the model's own layers, survivors as plain lists.

One sequence at a time, without padding, cache or hooks on layers. Of the patched model nothing is
used, and the keep rule is that of llava_oracle, written from its definition.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from llava_oracle import Share, thin
from torch import Tensor

from adsc_kernels import CompressionSchedule


def shares(schedule: CompressionSchedule) -> dict[int, Share]:
    found: dict[int, Share] = {}
    for boundary in schedule.boundaries:
        factors = tuple(Fraction(share) for share in boundary.factors)
        found[boundary.layer] = factors if len(factors) == 2 else factors[0]
    return found


def decoder_of(model: Any) -> Any:
    base = model.base_model
    return base.language_model if hasattr(base, "language_model") else base.text_model


@torch.no_grad()
def decoder_inputs(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the unpatched model's decoder is given: embeddings, positions, deepstack features."""
    seen: dict[str, Any] = {}

    def catch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    handle = decoder_of(model).register_forward_pre_hook(catch, with_kwargs=True)
    model(**inputs, use_cache=False)
    handle.remove()
    return seen


def _mask(decoder: Any, layer: int, alive: list[int], blocks: list[int]) -> Tensor:
    count = len(alive)
    sees = torch.ones(count, count, dtype=torch.bool).tril()
    here = torch.tensor([blocks[i] for i in alive])
    sees |= (here[:, None] == here) & (here >= 0)
    types = getattr(decoder.config, "layer_types", None)
    if types is not None and types[layer] == "sliding_attention":
        rows = torch.arange(count)
        sees &= rows[:, None] - rows < decoder.config.sliding_window
    return torch.zeros(count, count).masked_fill(~sees, -torch.inf)[None, None]


Axes = tuple[int, ...]  # a token's time, row and column


def pictures_of(images: list[list[list[int]]]) -> list[list[int]]:
    """Tokens of each picture, from the rows of images and frames: frames that touch are one."""
    found: list[list[int]] = []
    for image in images:
        tokens = [i for row in image for i in row]
        if found and found[-1][-1] + 1 == tokens[0]:
            found[-1] += tokens
        else:
            found.append(tokens)
    return found


def renumbered(ids: list[Axes], pictures: list[list[int]], alive: list[int]) -> list[Axes]:
    """M-RoPE positions of the tokens that are alive, from those of all tokens of a sequence.

    Token after token: `up` is how far what comes next moves up.
    """
    picture_of = {picture[0]: picture for picture in pictures}
    found: dict[int, Axes] = {}
    up, token = 0, 0
    while token < len(ids):
        picture = picture_of.get(token)
        if picture is None:
            found[token] = tuple(n - up for n in ids[token])
            token += 1
            continue
        begin = ids[token]
        left = [i for i in picture if i in alive]
        rows, columns = (sorted({ids[i][axis] for i in left}) for axis in (1, 2))
        for i in left:
            time, row, column = ids[i]
            place = (time - begin[0], rows.index(row), columns.index(column))
            found[i] = tuple(first - up + n for first, n in zip(begin, place, strict=True))
        before = max(ids[i][axis] - begin[axis] for i in picture for axis in range(3)) + 1
        ends = [found[i][axis] - (begin[axis] - up) for i in left for axis in range(3)]
        up += before - (max(ends) + 1 if ends else 0)
        token += len(picture)
    return [found[i] for i in alive]


@torch.no_grad()
def oracle(
    model: Any,
    inputs: dict[str, Tensor],
    images: list[list[list[int]]],
    schedule: CompressionSchedule,
    blocks: list[int] | None = None,
) -> tuple[Tensor, list[list[int]]]:
    """Logits [T_last, vocabulary] of a single sequence, and the survivors of every stage.

    images: for each picture its rows of token indices. blocks: for each token a number; those that
    share one of at least 0 see each other both ways.
    """
    decoder, given = decoder_of(model), decoder_inputs(model, inputs)
    x, ids = given["inputs_embeds"], given.get("position_ids")
    width = x.shape[1]
    ids = torch.arange(width)[None] if ids is None else ids
    ids = ids[1:] if ids.dim() == 3 and len(ids) == 4 else ids
    features = given.get("deepstack_visual_embeds") or []
    visual = given["visual_pos_masks"][0].nonzero().flatten().tolist() if features else []
    keep, blocks = shares(schedule), blocks or [-1] * width
    pictures = pictures_of(images)
    vision = {i for image in images for row in image for i in row}
    text = [i for i in range(width) if i not in vision]
    alive, stages = list(range(width)), [list(range(width))]
    for n, layer in enumerate(decoder.layers):
        if n in keep:
            images = [thin(image, schedule.pattern, keep[n]) for image in images]
            left = sorted(text + [i for image in images for row in image for i in row])
            x, alive = x[:, [alive.index(i) for i in left]], left
            stages.append(alive)
        where = ids[..., alive]
        if schedule.positions == "renumber":
            if ids.dim() == 3:
                axes = [tuple(n) for n in ids[:, 0].T.tolist()]
                where = torch.tensor(renumbered(axes, pictures, alive)).T[:, None]
            else:
                where = ids[..., :1] + torch.arange(len(alive))
        types = getattr(decoder.config, "layer_types", None)
        # Gemma 3 turns the two kinds of layers by different angles.
        kind = {"layer_type": types[n]} if decoder.config.model_type == "gemma3_text" else {}
        out = layer(
            x,
            attention_mask=_mask(decoder, n, alive, blocks),
            position_ids=where,
            position_embeddings=decoder.rotary_emb(x, where, **kind),
        )
        x = out[0] if isinstance(out, tuple) else out
        if n < len(features):
            for row, i in enumerate(alive):
                if i in visual:
                    x[0, row] += features[n][visual.index(i)]
    return model.lm_head(decoder.norm(x))[0], stages
