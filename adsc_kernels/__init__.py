"""ADSC kernels: uniform vision-token downsampling inside multimodal LLMs (arXiv 2602.12618)."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adsc_kernels import accounting, attention, ops, reference
    from adsc_kernels import integrations as integrations
    from adsc_kernels import llava as llava
    from adsc_kernels.backend import available_backends, backend
    from adsc_kernels.errors import UnsupportedError
    from adsc_kernels.integrations.hf import apply_adsc, remove_adsc
    from adsc_kernels.plan import CompressionPlan, StagePlan, make_plan
    from adsc_kernels.schedule import Boundary, CompressionSchedule

    __version__: str

# Where each public name comes from; what is not named here is a submodule. They are imported when
# they are asked for: llava brings transformers, and the command line needs no torch for most of it.
_HOMES = {
    "Boundary": "schedule",
    "CompressionPlan": "plan",
    "CompressionSchedule": "schedule",
    "StagePlan": "plan",
    "UnsupportedError": "errors",
    "apply_adsc": "integrations.hf",
    "available_backends": "backend",
    "make_plan": "plan",
    "remove_adsc": "integrations.hf",
}
_SUBMODULES = ("accounting", "attention", "integrations", "llava", "ops", "reference")


def __getattr__(name: str) -> Any:
    value: Any
    if name == "__version__":
        value = _version()
    elif name in _HOMES:
        value = getattr(import_module(f"adsc_kernels.{_HOMES[name]}"), name)
    elif name in _SUBMODULES:
        value = import_module(f"adsc_kernels.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("adsc_kernels")
    except PackageNotFoundError:  # a source folder on the path, not installed
        return "unknown"


# torch.ops.adsc_kernels.* are there, with gradients and shapes for tracing, once this package has
# been imported. The command `adsc` alone leaves that to the commands that need torch.
if "adsc_command" not in sys.modules:
    import_module("adsc_kernels.ops")
    import_module("adsc_kernels.plan")  # without the native module there is nothing to go on with
    from adsc_kernels.backend import backend  # the class, in the place of its module

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
