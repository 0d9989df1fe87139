"""What lies beside a PEFT adapter: the schedule it was trained under, and which model it belongs to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from adsc_kernels.hub import read_json
from adsc_kernels.schedule import CompressionSchedule

FILE = "adsc.json"
# The final norm: a vector that every training moves, read without the rest of a checkpoint.
_NORMS = (
    "language_model.model.norm.weight",
    "model.language_model.norm.weight",
    "model.norm.weight",
    "language_model.norm.weight",
)


def fingerprint(folder: Path) -> str:
    """Of a checkpoint's final norm, as it is on disk; ValueError where there is none."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in _NORMS:
                if name in weights.keys():  # noqa: SIM118
                    return digest(weights.get_tensor(name))
    raise ValueError(f"{folder}: expected the decoder's final norm in safetensors, got none")


def digest(norm: torch.Tensor) -> str:
    """Of the final norm's values, whatever they are stored as."""
    return hashlib.sha256(norm.detach().float().cpu().numpy().tobytes()).hexdigest()


def write_facts(folder: Path, schedule: CompressionSchedule, base: str, training: Any) -> None:
    """Beside the adapter; training: plain values that say how it was made."""
    facts = {"schedule": schedule.to_dict(), "base_norm_sha256": base, "training": training}
    (folder / FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read_schedule(folder: Path, base: str | None = None) -> CompressionSchedule:
    """The schedule of an adapter; ValueError where it is of another model than the digest `base`."""
    facts = read_json(folder / FILE)
    made_for = facts.get("base_norm_sha256")
    if base is not None and made_for != base:
        raise ValueError(
            f"adapter {folder}: expected one of this model, got one of another (its final norm is "
            f"{str(made_for)[:12]}, this model's {base[:12]})"
        )
    try:
        return CompressionSchedule.from_dict(facts.get("schedule", {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / FILE}: {error}") from error
