"""Random in-LLM: a schedule's layers and counts, but which patches stay is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adsc_kernels.baselines.adsc import Adsc
from adsc_kernels.baselines.batch import Batch
from adsc_kernels.baselines.decoder import Rows, Select, View
from adsc_kernels.baselines.method import InDecoder
from adsc_kernels.llava import LlavaConfig
from adsc_kernels.schedule import CompressionSchedule


class RandomDrop(InDecoder):
    """For each question and boundary another draw, by `seed`; whatever the batch."""

    def __init__(self, config: LlavaConfig, schedule: CompressionSchedule, seed: int) -> None:
        self.tokens, self.seed = Adsc(config, schedule).tokens, seed
        self.counts = {b.layer: self.tokens[b.layer] for b in schedule.boundaries}

    def selector(self, x: Tensor, rows: Rows, batch: Batch) -> Select:
        """As `InDecoder.selector`."""
        draws = [torch.Generator().manual_seed(self.seed * 1_000_003 + n) for n in batch.numbers]

        def select(n: int, before: View | None, here: View) -> Sequence[Tensor] | None:
            if n not in self.counts:
                return None
            return [
                torch.randperm(end - begin, generator=rng)[: self.counts[n]].sort().values
                for rng, (begin, end) in zip(draws, here.rows.spans, strict=True)
            ]

        return select
