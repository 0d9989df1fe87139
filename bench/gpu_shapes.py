"""The sizes that the GPU benches report, and stages for them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from gpu_timing import DEVICE, DRY_RUN

from adsc_kernels import CompressionSchedule, StagePlan, make_plan

TEXT, VISION = (11, 24) if DRY_RUN else (101, 576)
HIDDEN = 8 if DRY_RUN else 4096
COMPILED = (1, 32)  # batches at which PyTorch is compiled too, which takes seconds


@dataclass(frozen=True)
class Batch:
    """Prompts of one picture each, or of none to three; a quarter of each picture stays."""

    sequences: int
    hidden: int = HIDDEN
    text: int = TEXT
    vision: int = VISION
    ragged: bool = False

    @property
    def name(self) -> str:
        prompt = "" if (self.text, self.vision) == (TEXT, VISION) else f" of {self.vision} tokens"
        kind = " ragged" if self.ragged else prompt
        return f"batch {self.sequences}{kind}, hidden {self.hidden}"

    @property
    def telling(self) -> bool:
        return self in TELLING

    @property
    def compiled(self) -> bool:
        return self == Batch(self.sequences) and self.sequences in COMPILED

    def pictures(self, sequence: int) -> int:
        return sequence % 4 if self.ragged else 1

    def layout(self) -> tuple[list[int], list[tuple[int, int, int]]]:
        """cu_seqlens and the spans of the pictures, which stand behind a third of the text."""
        lengths, spans = [], []
        for b in range(self.sequences):
            text = self.text + (37 * b % (2 * self.text) if self.ragged else 0)
            begin = text // 3
            for _ in range(self.pictures(b)):
                spans.append((b, begin, self.vision))
                begin += self.vision + 1  # a token of text between two
            lengths.append(text + self.pictures(b) * self.vision)
        return [*accumulate(lengths, initial=0)], spans

    def stage(self) -> StagePlan:
        schedule = CompressionSchedule.parse("1:1/4", num_layers=2)
        return make_plan(schedule, *self.layout(), device=DEVICE).stages[1]


# Most telling first. Payloads from one prompt's to 61 MiB at 32, 123 MiB at 64, 245 MiB at 128.
TELLING = [*(Batch(n) for n in (1, 8, 32, 128)), Batch(8, 5120)]
BATCHES = [
    *TELLING,
    Batch(32, ragged=True),
    Batch(8192, text=3, vision=16),
    Batch(8, 3584),
    Batch(64),
]
if DRY_RUN:
    BATCHES = [Batch(1), Batch(2, 16), Batch(5, ragged=True), Batch(9, text=3, vision=16)]
LLAVA_13B = 16 if DRY_RUN else 5120
