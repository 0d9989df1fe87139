"""Pictures to rows of the decoder: transformers' CLIP tower, then LLaVA's two-layer projector."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel
from transformers.activations import ACT2FN

from .config import LlavaConfig


class Projector(nn.Module):
    """Rows of the tower, [..., vision width x feature layers], to rows of the decoder."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        width = config.vision.hidden_size * len(config.vision_feature_layers)
        self.linear_1 = nn.Linear(width, config.hidden_size, bias=config.projector_bias)
        self.act = ACT2FN[config.projector_act]
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size, config.projector_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Both layers."""
        return self.linear_2(self.act(self.linear_1(x)))


def make_tower(config: LlavaConfig) -> CLIPVisionModel:
    """The tower with its weights still to come, and the one table that it derives itself."""
    with torch.device("meta"):
        tower = CLIPVisionModel(config.vision)
    for module in tower.modules():
        if "position_ids" in module._buffers:
            module.position_ids = torch.arange(config.grid**2 + 1)[None]
    return tower


def image_features(
    tower: CLIPVisionModel, projector: Projector, pixels: Tensor, config: LlavaConfig
) -> Tensor:
    """pixels [N, 3, S, S] -> [N, tokens_per_image, hidden_size]."""
    states = tower(pixels, output_hidden_states=True).hidden_states
    rows = torch.cat([states[n] for n in config.vision_feature_layers], dim=-1)
    return projector(rows if config.keep_class_token else rows[:, 1:])
