"""Other ways of answering with fewer vision tokens, re-implemented to be compared at equal cost.

A budget is the average of vision tokens that decoder layers *process*: what comes into each.
Each method is one file; `method.py` is what they share, `decoder.py` runs layers on rows that were
chosen. They show selection rules on the thin LLaVA, in batches, and are not tuned for speed.
"""

from __future__ import annotations

from collections.abc import Callable

from adsc_kernels import checks
from adsc_kernels.baselines.adsc import Adsc, uniform
from adsc_kernels.baselines.div_prune import DivPrune
from adsc_kernels.baselines.fastv import FastV
from adsc_kernels.baselines.method import Method
from adsc_kernels.baselines.pooling import AveragePooling, Downsampling
from adsc_kernels.baselines.pyramid_drop import PyramidDrop
from adsc_kernels.baselines.random_drop import RandomDrop
from adsc_kernels.baselines.sparse_vlm import SparseVLM
from adsc_kernels.baselines.vision_zip import VisionZip
from adsc_kernels.llava import LlavaConfig
from adsc_kernels.schedule import CompressionSchedule

BY_BUDGET: dict[str, Callable[[LlavaConfig, int], Method]] = {
    "fastv": FastV,
    "pyramid_drop": PyramidDrop,
    "sparse_vlm": SparseVLM,
    "vision_zip": VisionZip,
    "div_prune": DivPrune,
    "uniform": uniform,
    "average_pooling": AveragePooling,
    "downsampling": Downsampling,
}
BY_SCHEDULE = ("adsc", "random")
METHODS = (*BY_SCHEDULE, *BY_BUDGET)


def make_method(
    name: str,
    config: LlavaConfig,
    *,
    schedule: CompressionSchedule | None = None,
    budget: int | None = None,
    seed: int = 0,
) -> Method:
    """A method by its name; `adsc` and `random` take a schedule, the others a budget.

    Raises ValueError for what doesn't go together, and UnsupportedError where a method can't go as
    low as the budget.
    """
    checks.choice("method", name, METHODS)
    if name in BY_SCHEDULE:
        if budget is not None or schedule is None:
            raise ValueError(f"{name}: expected a schedule and no budget")
        return Adsc(config, schedule) if name == "adsc" else RandomDrop(config, schedule, seed)
    if schedule is not None or budget is None:
        raise ValueError(f"{name}: expected a budget and no schedule")
    checks.integer("budget", budget, 1, config.tokens_per_image)
    return BY_BUDGET[name](config, budget)


__all__ = ["BY_BUDGET", "BY_SCHEDULE", "METHODS", "Method", "make_method"]
