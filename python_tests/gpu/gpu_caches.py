"""Stages and caches of a real size, on the device."""

from __future__ import annotations

import torch
from gpu_device import DEVICE, DRY_RUN
from torch import Tensor

from adsc_kernels import CompressionSchedule, StagePlan, make_plan

TEXT, VISION = (9, 24) if DRY_RUN else (101, 576)


def image_stage(batch: int, keep: str, vision: int = VISION) -> StagePlan:
    schedule = CompressionSchedule.parse(f"1:{keep}", num_layers=2)
    length = TEXT + vision
    bounds = [b * length for b in range(batch + 1)]
    spans = [(b, TEXT // 3, vision) for b in range(batch)]
    return make_plan(schedule, bounds, spans, device=DEVICE).stages[1]


def random(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
