"""What is installed here, which backends work, and why the others don't."""

from __future__ import annotations

import platform
from typing import Any

from adsc_kernels import _C
from adsc_kernels.stamp import version_of

PACKAGES = ("torch", "transformers", "triton", "flash-attn", "safetensors", "pillow", "numpy")


def report() -> dict[str, Any]:
    """Everything as plain JSON types; what is missing or broken is reported, never raised."""
    return {
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in ("adsc_kernels", *PACKAGES)},
        "cuda": _cuda(),
        "build": dict(_C.build_info()),
        "backends": _backends(),
        "attention": _attention(),
        "checkpoint": _checkpoint(),
    }


def _cuda() -> dict[str, Any]:
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability = f"{found.major}.{found.minor}"
        devices.append({"name": found.name, "capability": capability, "bytes": found.total_memory})
    return {"torch_built_for": torch.version.cuda, "devices": devices}


def _backends() -> dict[str, dict[str, Any]]:
    from adsc_kernels.backend import available_backends

    return {
        name: {"works": works, "reason": reason}
        for name, (works, reason) in available_backends().items()
    }


def _attention() -> dict[str, dict[str, Any]]:
    """Asked for the tensors that one would use here: 16 bits on a GPU, 32 bits on the CPU."""
    import torch

    from adsc_kernels.attention import available
    from adsc_kernels.attention_backends import BACKENDS, ORDER, choose

    gpu = torch.cuda.is_available()
    kind = ("cuda" if gpu else "cpu", torch.bfloat16 if gpu else torch.float32)
    chosen = {phase: choose(phase, torch.device(kind[0]), kind[1], 64)[0] for phase in ORDER}
    return {
        name: {
            "works": reason is None,
            "reason": reason or "",
            "chosen_for": [phase for phase, first in chosen.items() if first == name],
            "phases": list(BACKENDS[name].phases),
            "dtypes": BACKENDS[name].takes_dtypes,
            "head_sizes": BACKENDS[name].takes_head_dims,
            "capability": BACKENDS[name].takes_capability,
            "cuda_graphs": BACKENDS[name].graphed,
            "keys_in_shares": BACKENDS[name].shares,
            "paged": BACKENDS[name].takes_blocks,
        }
        for name, reason in available(*kind).items()
    }


def _checkpoint() -> str | None:
    from adsc_kernels.llava import bundled_checkpoint

    folder = bundled_checkpoint()
    return str(folder) if (folder / "config.json").is_file() else None
