"""The sizes that the GPU benches report, and stages for them."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_timing import DEVICE, DRY_RUN

from adsc_kernels import CompressionSchedule, StagePlan, make_plan

TEXT, VISION = (11, 24) if DRY_RUN else (101, 576)
LLAVA_7B, LLAVA_13B = (8, 16) if DRY_RUN else (4096, 5120)  # hidden


@dataclass(frozen=True)
class Batch:
    """Prompts of one picture each; a quarter of its tokens stays."""

    sequences: int
    hidden: int = LLAVA_7B

    @property
    def name(self) -> str:
        return f"batch {self.sequences}, hidden {self.hidden}"

    def layout(self) -> tuple[list[int], list[tuple[int, int, int]]]:
        """cu_seqlens and the spans of the pictures."""
        length = TEXT + VISION
        bounds = [b * length for b in range(self.sequences + 1)]
        return bounds, [(b, TEXT // 3, VISION) for b in range(self.sequences)]

    def stage(self) -> StagePlan:
        schedule = CompressionSchedule.parse("1:1/4", num_layers=2)
        return make_plan(schedule, *self.layout(), device=DEVICE).stages[1]


# From one prompt to payloads past 64 MiB: 61 MiB at 32, 123 MiB at 64, 245 MiB at 128.
BATCHES = [Batch(n) for n in ((1, 2) if DRY_RUN else (1, 8, 32, 64, 128))]
BATCHES.append(Batch(1 if DRY_RUN else 8, LLAVA_13B))
