"""VisionZip: before the decoder, the patches that the tower's CLS token looks at, and averages."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from adsc_kernels.baselines.method import BeforeDecoder, strongest
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.llava import Llava, LlavaConfig

CONTEXTUAL = 10 / 64  # of the tokens that stay: 54 + 10, 108 + 20, 162 + 30


class VisionZip(BeforeDecoder):
    """Dominant: CLS itself and the patches with most of its attention, summed over heads, in the
    tower's layer whose features are taken. Contextual: of the others, in even distances, each with
    the mean of those whose keys are likest to its own added. Positions go on from what is left.
    """

    renumber = True

    def __init__(self, config: LlavaConfig, budget: int) -> None:
        if config.keep_class_token or len(config.feature_layers) != 1:
            raise UnsupportedError("vision_zip: expected features of one layer, without CLS")
        self.contextual = max(round(budget * CONTEXTUAL), 1)
        self.dominant = budget - self.contextual
        if self.dominant < 1:
            raise UnsupportedError(f"vision_zip: expected a budget of at least 2, got {budget}")
        self.tokens = [budget] * config.num_layers

    def pictures(self, model: Llava, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `BeforeDecoder.pictures`."""
        number = model.config.feature_layers[0]
        pixels = pixels.to(model.language_model.embed_tokens.weight)
        states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
        depth = len(states) - 1
        layer = encoder_layers(model)[(number if number >= 0 else depth + 1 + number) - 1]
        shares, keys = cls_attention(layer, states[number - 1])
        rows = [self._merge(*one) for one in zip(states[number], shares, keys, strict=True)]
        projector = model.multi_modal_projector
        act = ACT2FN[model.config.hf.projector_hidden_act]
        merged = projector["linear_2"](act(projector["linear_1"](torch.stack(rows))))
        places = torch.arange(merged.shape[1], device=merged.device).expand(len(merged), -1)
        return merged, places

    def _merge(self, features: Tensor, shares: Tensor, keys: Tensor) -> Tensor:
        """features: [1 + patches, width]; shares: [patches]; keys: [1 + patches, head width]."""
        top = strongest(shares, self.dominant - 1) + 1
        dominant = torch.cat([torch.zeros_like(top[:1]), top]) if len(top) else top.new_zeros(1)
        rest = torch.ones(len(features), dtype=torch.bool, device=features.device)
        rest[dominant] = False
        others, metric = features[rest], F.normalize(keys[rest], dim=-1)
        step = max(len(others) // self.contextual, 1)
        targets = torch.arange(0, len(others), step, device=rest.device)[: self.contextual]
        merged = torch.ones(len(others), dtype=torch.bool, device=rest.device)
        merged[targets] = False
        nearest = (metric[merged] @ metric[targets].T).argmax(-1)
        count = torch.bincount(nearest, minlength=len(targets)).clamp(min=1)
        total = torch.zeros_like(others[targets]).index_add_(0, nearest, others[merged])
        return torch.cat([features[dominant], others[targets] + total / count[:, None]])


def encoder_layers(model: Llava) -> Any:
    """Of the tower, wherever the installed transformers has them."""
    tower: Any = getattr(model.vision_tower, "vision_model", model.vision_tower)
    return tower.encoder.layers


def cls_attention(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """CLS's shares on the patches, summed over heads [P, patches], and each token's keys, mean over
    heads [P, 1 + patches, head width]; x: what comes into the layer.
    """
    attn, x = layer.self_attn, layer.layer_norm1(x)
    q, k = (p(x).unflatten(-1, (attn.num_heads, -1)) for p in (attn.q_proj, attn.k_proj))
    scores = torch.einsum("phd,pkhd->phk", q[:, 0], k) * attn.scale
    return scores.float().softmax(-1).sum(1)[:, 1:], k.mean(2)
