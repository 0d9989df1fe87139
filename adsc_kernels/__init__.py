"""ADSC kernels: uniform vision-token downsampling inside multimodal LLMs (arXiv 2602.12618)."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from adsc_kernels import accounting, attention, ops, reference
from adsc_kernels.backend import available_backends, backend
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.plan import CompressionPlan, StagePlan, make_plan
from adsc_kernels.schedule import Boundary, CompressionSchedule

try:
    __version__ = version("adsc_kernels")
except PackageNotFoundError:  # a source folder on the path, not installed
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    """What brings transformers is imported when it is asked for."""
    if name == "llava":
        return import_module("adsc_kernels.llava")
    if name in ("apply_adsc", "remove_adsc"):
        return getattr(import_module("adsc_kernels.integrations.hf"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Boundary",
    "CompressionPlan",
    "CompressionSchedule",
    "StagePlan",
    "UnsupportedError",
    "accounting",
    "apply_adsc",
    "attention",
    "available_backends",
    "backend",
    "make_plan",
    "ops",
    "reference",
    "remove_adsc",
]
