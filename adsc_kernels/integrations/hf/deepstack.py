"""DeepStack (Qwen3-VL): features of pictures that are added behind the first layers, by stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adsc_kernels.errors import UnsupportedError
from adsc_kernels.integrations.hf.stage_pass import StagePass
from adsc_kernels.integrations.hf.tables import Tables


@dataclass
class Deepstack:
    """Features that are still to be added.

    Attributes:
        where: bool [B, S] of stage 0, the tokens that have some.
        number: int64 [B, S], which row of the features they have.
        features: for each of the first layers [tokens, hidden], added behind it.
    """

    where: Tensor
    number: Tensor
    features: list[Tensor]

    def add(self, behind: int, x: Tensor, tables: Tables | None) -> Tensor:
        """x of the layer `behind` with its features; tables of its stage, None where it is full."""
        where, number = self.where.to(x.device), self.number.to(x.device)
        if tables is not None:
            columns = tables.columns.to(x.device)
            where = where.gather(1, columns) & tables.real.to(x.device)
            number = number.gather(1, columns)
        features = self.features[behind].to(x.device, x.dtype)
        return torch.where(where[..., None], x + features[number], x)


def take(run: StagePass, arguments: dict[str, Any]) -> None:
    """Take them from the decoder, whose rows may be fewer than they are made for."""
    where, features = (
        arguments.pop(name, None) for name in ("visual_pos_masks", "deepstack_visual_embeds")
    )
    if features is None:
        return
    if len(features) >= run.schedule.num_layers:
        raise UnsupportedError(
            f"deepstack_visual_embeds: expected fewer than the {run.schedule.num_layers} layers, "
            f"got {len(features)}"
        )
    number = where.flatten().cumsum(0).view(where.shape) - 1
    run.deepstack = Deepstack(where, number.clamp(min=0), list(features))
