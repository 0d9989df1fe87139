"""ADSC kernels: uniform vision-token downsampling inside multimodal LLMs (arXiv 2602.12618)."""

from importlib.metadata import PackageNotFoundError, version

from . import ops, reference
from .backend import available_backends, backend
from .errors import UnsupportedError
from .plan import CompressionPlan, StagePlan, make_plan
from .schedule import Boundary, CompressionSchedule

try:
    __version__ = version("adsc_kernels")
except PackageNotFoundError:  # a source folder on the path, not installed
    __version__ = "unknown"

__all__ = [
    "Boundary",
    "CompressionPlan",
    "CompressionSchedule",
    "StagePlan",
    "UnsupportedError",
    "available_backends",
    "backend",
    "make_plan",
    "ops",
    "reference",
]
