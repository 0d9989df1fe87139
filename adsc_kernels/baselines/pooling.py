"""Average pooling of a picture's rows, and the picture itself made smaller, before the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from adsc_kernels.baselines.method import BeforeDecoder, centers, near_square
from adsc_kernels.llava import Llava, LlavaConfig


class AveragePooling(BeforeDecoder):
    """Means of projected rows over a grid, each at the position of the patch in its middle."""

    def __init__(self, config: LlavaConfig, budget: int) -> None:
        self.shape, self.tokens = near_square(budget), [budget] * config.num_layers

    def pictures(self, model: Llava, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `BeforeDecoder.pictures`."""
        side = model.config.grid
        grid = model.image_features(pixels).unflatten(1, (side, side)).permute(0, 3, 1, 2)
        rows = F.adaptive_avg_pool2d(grid, self.shape).flatten(2).transpose(1, 2)
        return rows, centers(model, *self.shape).expand(len(rows), -1)


class Downsampling(BeforeDecoder):
    """The picture resized so that it has `budget` patches: the tower, whose position embeddings are
    interpolated, does less too. Rows are at the position of what they show.
    """

    def __init__(self, config: LlavaConfig, budget: int) -> None:
        self.shape, self.tokens = near_square(budget), [budget] * config.num_layers

    def pictures(self, model: Llava, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `BeforeDecoder.pictures`."""
        patch = model.config.hf.vision_config.patch_size
        size = [n * patch for n in self.shape]
        small = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
        small = small.to(model.language_model.embed_tokens.weight)
        states = model.vision_tower(small, output_hidden_states=True, interpolate_pos_encoding=True)
        rows = project(model, states.hidden_states)
        return rows, centers(model, *self.shape).expand(len(rows), -1)


def project(model: Llava, states: Sequence[Tensor]) -> Tensor:
    """The tower's states, CLS left out, to rows of the decoder."""
    rows = torch.cat([states[n] for n in model.config.feature_layers], dim=-1)[:, 1:]
    projector, act = model.multi_modal_projector, ACT2FN[model.config.hf.projector_hidden_act]
    return projector["linear_2"](act(projector["linear_1"](rows)))
