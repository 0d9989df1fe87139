"""ADSC itself, and pre-LLM uniform, which is a schedule whose only boundary is before layer 0."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from adsc_kernels.baselines.batch import Batch, embed
from adsc_kernels.baselines.method import Method, near_square, stages
from adsc_kernels.cache import Phase
from adsc_kernels.llava import Llava, LlavaConfig
from adsc_kernels.plan import make_plan
from adsc_kernels.schedule import CompressionSchedule


class Adsc(Method):
    """The thin LLaVA under a schedule."""

    def __init__(self, config: LlavaConfig, schedule: CompressionSchedule) -> None:
        self.schedule = schedule
        counts = schedule.kept(config.tokens_per_image, config.grid, config.grid)
        layers = [boundary.layer for boundary in schedule.boundaries]
        self.tokens = stages(layers, counts, config.num_layers)

    def hidden(self, model: Llava, batch: Batch) -> tuple[Tensor, Sequence[int]]:
        """As `Method.hidden`."""
        side = model.config.grid
        spans = [(b, start, side * side, side, side) for b, start in enumerate(batch.starts)]
        plan = make_plan(self.schedule, [0, *accumulate(batch.lens)], spans, model.device)
        out = model.with_schedule(self.schedule)(embed(model, batch), plan, Phase.PREFILL)
        return out, plan.stages[-1].seq_lens


def uniform(config: LlavaConfig, budget: int) -> Adsc:
    """Pre-LLM uniform: `budget` of a picture's tokens, on a grid, in front of the decoder."""
    rows, columns = (f"{side}/{config.grid}" for side in near_square(budget))
    text = f"0:{rows}x{columns}@grid"
    return Adsc(config, CompressionSchedule.parse(text, config.num_layers))
