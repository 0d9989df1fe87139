"""Which schedule a step trains under: a function of the step and of the losses logged so far.

Nothing else is remembered, so a resumed run goes on in the phase it was interrupted in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from adsc_kernels.schedule import CompressionSchedule
from adsc_kernels.training.config import CurriculumSettings

SIDE = 24  # of the picture by which schedules are compared
SCALE = SIDE * SIDE


def average(schedule: CompressionSchedule, rows: int = SIDE, columns: int = SIDE) -> Fraction:
    """Vision tokens that a layer processes on average, of a picture of rows x columns."""
    kept = schedule.kept(rows * columns, rows, columns)
    layers = [len(schedule.layers_of_stage(s)) for s in range(schedule.num_stages)]
    return Fraction(sum(n * count for n, count in zip(kept, layers, strict=True))) / sum(layers)


class Curriculum:
    """The phases of a run, in order; the last is the run's own schedule.

    Raises ValueError where a schedule to go through is not on the side that the direction says.
    """

    def __init__(
        self, settings: CurriculumSettings, schedule: CompressionSchedule, steps: int
    ) -> None:
        self.settings, self.steps = settings, steps
        rising = settings.direction == "strong_to_mild"
        through = [CompressionSchedule.parse(t, schedule.num_layers) for t in settings.through]
        for other in through:
            if (
                average(other) == average(schedule)
                or (average(other) < average(schedule)) != rising
            ):
                want = "stronger" if rising else "milder"
                raise ValueError(
                    f"curriculum.through: expected schedules {want} than {str(schedule)!r}, "
                    f"got {str(other)!r}"
                )
        self.phases = (*sorted(through, key=average, reverse=not rising), schedule)
        before = steps - math.ceil(steps * settings.last_share)
        # A phase ends here at the latest.
        self.ends = [before * (n + 1) // max(len(through), 1) for n in range(len(through))]

    def phase(self, step: int, losses: Sequence[tuple[int, float]]) -> int:
        """Of the step to come, counted from 0. losses: (steps done, loss) of every log so far."""
        begun = 0
        for number, end in enumerate(self.ends):
            if self.settings.pace == "plateau":
                end = min(end, self._flat(begun, losses))
            if step < end:
                return number
            begun = end
        return len(self.ends)

    def _flat(self, begun: int, losses: Sequence[tuple[int, float]]) -> int:
        """The step by which a phase's loss has stopped falling; the run's length if it has not."""
        width = self.settings.patience
        seen = [(step, loss) for step, loss in losses if step > begun]
        for n in range(2 * width, len(seen) + 1):
            means = [
                sum(loss for _, loss in seen[at : at + width]) / width
                for at in (n - 2 * width, n - width)
            ]
            if means[1] > means[0] * (1 - self.settings.least_gain):
                return seen[n - 1][0]
        return self.steps
