"""DivPrune: before the decoder, the patches that differ most, by the largest least distance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adsc_kernels.baselines.method import BeforeDecoder
from adsc_kernels.llava import Llava, LlavaConfig


class DivPrune(BeforeDecoder):
    """Greedily: first the patch whose nearest other is farthest, by 1 - cosine of the projected
    rows, then each time the one farthest from all that are chosen. They keep their positions.
    """

    def __init__(self, config: LlavaConfig, budget: int) -> None:
        self.kept, self.tokens = budget, [budget] * config.num_layers

    def pictures(self, model: Llava, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `BeforeDecoder.pictures`."""
        features = model.image_features(pixels)
        places = diverse(features, self.kept)
        return features.gather(1, places[..., None].expand(-1, -1, features.shape[-1])), places


def diverse(rows: Tensor, count: int) -> Tensor:
    """Of [P, n, width], where `count` of each n are, rising, int64 [P, count]."""
    unit = F.normalize(rows.float(), dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    apart = distance.clone()
    apart.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    nearest = apart.min(-1).values
    chosen = []
    for _ in range(count):
        one = nearest.argmax(-1)
        chosen.append(one)
        step = distance.gather(1, one[:, None, None].expand(-1, 1, rows.shape[1]))[:, 0]
        nearest = step if len(chosen) == 1 else torch.minimum(nearest, step)
        nearest.scatter_(1, torch.stack(chosen, 1), float("-inf"))
    return torch.stack(chosen, 1).sort(-1).values
