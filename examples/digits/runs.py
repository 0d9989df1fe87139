"""The training runs behind docs/accuracy.md: one YAML each for `adsc train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).parents[2] / "adsc_kernels" / "checkpoints" / "tiny-llava-digits"
# By the vision tokens, of 576, that a layer processes on average: at most what the name says.
SCHEDULES = {
    "dense": "",
    "192": "2:1/3,10:1/3",
    "128": "1:1/3,5:1/3",
    "64": "1:1/4x1/4,13:1/3x1/3@grid",
    "36": "0:1/2x1/2,1:1/2x1/2,12:1/3x1/3@grid",
    "16": "0:1/4x1/4,6:1/3x1/3@grid",
}
UNIFORM = {"64": "0:1/3x1/3@grid"}  # all of it dropped in front of the decoder
ORDER = ("16", "36", "64", "128", "192")
SETTINGS = {
    "steps": 300,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "log_every": 10,
    "save_every": 50,
    "lora": {"rank": 16, "alpha": 32},
}


@dataclass(frozen=True)
class Run:
    """One adapter. direction: of the curriculum; "uniform" is the control that drops nothing inside
    the decoder, trained at the budget.
    """

    budget: str
    direction: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.budget}-{self.direction}-{self.seed}"

    @property
    def at_others(self) -> bool:
        """Whether it is evaluated under the schedules of other budgets too: what more training
        alone does, and how far one adapter serves them all."""
        return self.budget == "dense" or (self.budget, self.direction) == ("64", "strong_to_mild")

    def config(self, data: Path, work: Path, device: str) -> dict[str, object]:
        """What the YAML file holds."""
        at = 0 if self.budget == "dense" else ORDER.index(self.budget)
        through = {
            "constant": (),
            "uniform": (),
            "strong_to_mild": ORDER[max(at - 2, 0) : at],
            "mild_to_strong": ORDER[at + 1 : at + 3],
        }[self.direction]
        direction = "constant" if self.direction == "uniform" else self.direction
        if not through and direction != "constant":
            raise ValueError(f"{self.name}: no schedule lies on that side of {self.budget}")
        texts = [SCHEDULES[budget] for budget in through]
        return {
            "model": str(MODEL),
            "data": str(data),
            "out": str(work / self.name),
            "schedule": (UNIFORM if self.direction == "uniform" else SCHEDULES)[self.budget],
            "seed": self.seed,
            "curriculum": {"direction": direction, "through": texts},
            "device": device,
            **SETTINGS,
        }


# The most telling first.
RUNS = (
    Run("64", "strong_to_mild", 0),
    Run("64", "constant", 0),
    Run("36", "strong_to_mild", 0),
    Run("16", "constant", 0),
    Run("dense", "constant", 0),
    Run("64", "mild_to_strong", 0),
    Run("128", "strong_to_mild", 0),
    Run("192", "strong_to_mild", 0),
    Run("64", "uniform", 0),
    *(Run(budget, "strong_to_mild", seed) for seed in (1, 2) for budget in ("64", "36")),
    *(Run("64", way, seed) for seed in (1, 2) for way in ("constant", "mild_to_strong", "uniform")),
    *(Run("16", "constant", seed) for seed in (1, 2)),
    *(Run(budget, "strong_to_mild", seed) for seed in (1, 2) for budget in ("128", "192")),
    *(Run("dense", "constant", seed) for seed in (1, 2)),
)
