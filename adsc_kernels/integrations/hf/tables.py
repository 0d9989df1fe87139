"""What of a batch's layout the device needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adsc_kernels.integrations.hf.layout import BatchLayout
from adsc_kernels.plan import to_device


@dataclass
class Tables:
    """A stage's rows on the device.

    Attributes:
        keep: int64 [B * S_s], rows of the stage before; None where they are the same.
        columns: int64 [B, S_s], the columns of this pass they came from; 0 for padding.
        before: int64 [B, S_s], how many tokens of their sequence were dropped in front of them.
        told: int64 [B, S_s], the columns of the conversation they came from; -1 for padding.
        real: bool [B, S_s], False for padding.
    """

    keep: Tensor | None
    columns: Tensor
    before: Tensor
    told: Tensor
    real: Tensor


def upload(layout: BatchLayout, seen: int, device: torch.device) -> list[Tables]:
    """The tables of all stages, in two copies to the device and nothing to compute on it.

    seen: columns of the conversation before this pass.
    """
    numbers: list[np.ndarray] = []
    flags: list[np.ndarray] = []
    for stage in layout.stages:
        kept = np.empty(0, int) if stage.keep is None else stage.keep.ravel()
        where = np.where(stage.columns >= 0, stage.columns + seen, -1)
        numbers += [kept, stage.columns.clip(min=0), stage.before, where]
        flags.append(stage.columns >= 0)
    pieces, real_ones = iter(copied(numbers, device)), iter(copied(flags, device))
    tables = []
    for stage in layout.stages:
        rows, columns, before, told = (next(pieces) for _ in range(4))
        keep = None if stage.keep is None else rows
        tables.append(Tables(keep, columns, before, told, next(real_ones)))
    return tables


def copied(parts: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of one dtype on the device, by one copy."""
    packed = to_device(np.concatenate([part.ravel() for part in parts]), device)
    pieces = packed.split([part.size for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
