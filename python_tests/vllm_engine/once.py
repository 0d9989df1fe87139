"""What vLLM does for each engine, and a process that starts many of them needs once.

It is two thirds of the time of a small engine. Engines in processes of their own aren't changed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any


def nothing() -> None:
    pass


def install() -> None:
    from vllm import LLM  # noqa: F401  # brings in all that an engine imports
    from vllm.model_executor.models import registry
    from vllm.triton_utils import dispatcher

    # A model's class is looked at in a process of its own, lest CUDA start in this one.
    registry._run_in_subprocess = lambda inspect: inspect()

    # Kernels for the CPU take their places by a look at every name of every module.
    register = dispatcher.register_kernels

    def register_once(overrides: Mapping[str, Callable[..., Any]]) -> None:
        known = dispatcher._registry
        new = {name: kernel for name, kernel in overrides.items() if name not in known}
        if new:
            register(new)

    dispatcher.register_kernels = register_once

    # An engine freezes what there is; its shutdown thaws that and goes through it several times.
    # Nothing of what was imported is garbage, and all of the engine is to be found.
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = nothing
