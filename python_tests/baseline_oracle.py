"""Baselines restated plainly: transformers' layers and attentions, one sequence, index lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Of a layer's number, attention [heads, rows, rows] of the layer before and of itself, and the
# tokens that are there: those that stay, or None.
Choose = Callable[[int, "Tensor | None", Tensor, list[int]], "list[int] | None"]


@torch.no_grad()
def run(hf: Any, x: Tensor, positions: Tensor, choose: Choose | None = None) -> Tensor:
    """Logits of what is left of rows [n, hidden]; hf attends eagerly."""
    llama = hf.model.language_model
    tokens, before = list(range(len(x))), None
    x = x[None]
    for n, layer in enumerate(llama.layers):
        weights = attention(llama, layer, x, positions)
        kept = None if choose is None else choose(n, before, weights, tokens)
        if kept is not None:
            at = torch.tensor([tokens.index(token) for token in kept])
            x, positions, tokens = x[:, at], positions[at], kept
            weights = attention(llama, layer, x, positions)
        before = weights
        x = layer(x, **around(llama, x, positions))
    return hf.lm_head(llama.norm(x))[0]


def around(llama: Any, x: Tensor, positions: Tensor) -> dict[str, Any]:
    rows = x.shape[1]
    future = torch.ones(rows, rows).triu(1).bool()
    return {
        "attention_mask": torch.zeros(rows, rows).masked_fill(future, -1e30)[None, None],
        "position_embeddings": llama.rotary_emb(x, positions[None]),
    }


def attention(llama: Any, layer: Any, x: Tensor, positions: Tensor) -> Tensor:
    given = around(llama, x, positions)
    return layer.self_attn(hidden_states=layer.input_layernorm(x), **given)[1][0]


def highest(scores: Tensor, count: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda n: -float(scores[n]))
    return sorted(order[:count])
