"""LoRA adapters in PEFT's format, with the schedule they were trained under, merged into weights.

Reading one needs no peft. `adsc.json` beside it holds the schedule, and which model it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adsc_kernels import checks
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.hub import plain_name, read_json, read_weights, weight_files
from adsc_kernels.schedule import CONFIG_KEY, CompressionSchedule

FILE = "adsc.json"
NORM = "language_model.norm.weight"  # as the thin model names it
_CARD = """---
base_model: {name}
library_name: peft
---

# {name} under `{schedule}`

A LoRA adapter that `adsc train` made: the model answers while vision tokens are dropped by the
schedule, which `adsc.json` holds. Without the schedule, and under another, it is out of place.

```python
from adsc_kernels.llava import Llava

model = Llava.from_pretrained(base, adapter=folder)  # under the adapter's schedule
```

With peft: `PeftModel.from_pretrained(model, folder)`, then `adsc.apply_adsc(model, schedule)`.

How it was made:

```json
{training}
```
"""
_BESIDE = (".json", ".jinja", ".model", ".txt")  # a checkpoint's files that go with its weights
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
# What an adapter may say of itself beside plain LoRA, and what it has to be here.
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "fan_in_fan_out": (False, None),
}
# The final norm: a vector that every training moves, read without the rest of a checkpoint.
_NORMS = (
    "language_model.model.norm.weight",
    "model.language_model.norm.weight",
    "model.norm.weight",
    NORM,
)


def fingerprint(folder: Path) -> str:
    """Of a checkpoint's final norm, as it is on disk; ValueError where there is none."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in _NORMS:
                if name in weights.keys():  # noqa: SIM118
                    return digest(weights.get_tensor(name))
    raise ValueError(f"{folder}: expected the decoder's final norm in safetensors, got none")


def digest(norm: Tensor) -> str:
    """Of the final norm's values, whatever they are stored as."""
    return hashlib.sha256(norm.detach().float().cpu().numpy().tobytes()).hexdigest()


def write_facts(
    folder: Path, schedule: CompressionSchedule, base: str, name: str, training: Any
) -> None:
    """Beside the adapter: its schedule, a card in place of PEFT's empty one, and the model's name
    in place of where it lay.

    base: the model's `fingerprint`. training: plain values that say how the adapter was made.
    """
    facts = {"schedule": schedule.to_dict(), "base_norm_sha256": base, "training": training}
    (folder / FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    config = folder / "adapter_config.json"
    settings = {**read_json(config), "base_model_name_or_path": name}
    config.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    card = _CARD.format(name=name, schedule=schedule, training=json.dumps(training, indent=1))
    (folder / "README.md").write_text(card, encoding="utf-8")


def read_schedule(folder: Path, base: str | None = None) -> CompressionSchedule:
    """The schedule of an adapter; ValueError where its model is not that of digest `base`."""
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


def agree(
    folder: Path, schedule: CompressionSchedule | str | None, num_layers: int
) -> CompressionSchedule:
    """An adapter's schedule; ValueError where another one is given, or it is of another depth."""
    own = read_schedule(folder)
    if isinstance(schedule, str):
        schedule = CompressionSchedule.parse(schedule, num_layers)
    if own.num_layers != num_layers or (schedule is not None and schedule != own):
        want = f"{str(own)!r} of {own.num_layers} layers, which the adapter was trained under"
        got = f"{str(schedule or own)!r} for a model of {num_layers}"
        raise ValueError(f"schedule: expected {want}, got {got}")
    return own


def merge(weights: dict[str, Tensor], folder: Path, name_of: Callable[[str], str]) -> None:
    """Add an adapter to a model's weights: W += scale * B @ A, computed in float32.

    weights: by the thin model's names; those with an adapter are replaced, by float32. name_of: a
    checkpoint's name of a weight to that name.

    Raises FileNotFoundError, ValueError (damaged, of another model, or of other shapes) or
    UnsupportedError (no plain LoRA), before anything is replaced.
    """
    read_schedule(folder, digest(weights[NORM]))
    scale, pairs = read_lora(folder)
    merged: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        target = name_of(f"{name}.weight")
        weight = weights.get(target)
        if weight is None or weight.shape != (b.shape[0], a.shape[1]):
            got = "none" if weight is None else str(tuple(weight.shape))
            want = f"a weight {(b.shape[0], a.shape[1])} by the name of {target}"
            raise ValueError(f"adapter {folder}: expected {want} in the model, got {got}")
        device = weight.device
        merged[target] = weight.float() + scale * (b.float() @ a.float()).to(device)
    weights.update(merged)


def merge_checkpoint(model: Path, adapter: Path, out: Path) -> CompressionSchedule:
    """Write a checkpoint in Hugging Face format with an adapter merged into it.

    Weights keep their names and dtypes, each rounded once. `adsc_schedule` in its config.json is
    the adapter's schedule, which is returned: `apply_adsc` and the vLLM plug-in read it there.

    Raises what `merge` does, and ValueError where `out` is there or the adapter is for another
    depth; OSError where it can't be written, and then nothing is left of it.
    """
    if out.exists():
        raise ValueError(f"out {out}: expected a folder that is not there yet")
    config = read_json(model / "config.json")
    depth = config.get("text_config", config).get("num_hidden_layers")
    schedule = agree(adapter, None, checks.integer("num_hidden_layers", depth, 1))
    files = {file: read_weights(file, torch.device("cpu")) for file in weight_files(model)}
    weights = {plain_name(name): t for tensors in files.values() for name, t in tensors.items()}
    merge(weights, adapter, plain_name)
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for file in model.iterdir():
            if file.is_file() and file.suffix in _BESIDE:
                shutil.copyfile(file, part / file.name)
        for file, tensors in files.items():
            mixed = {name: weights[plain_name(name)].to(t.dtype) for name, t in tensors.items()}
            save_file(mixed, part / file.name, metadata={"format": "pt"})
        config = {**config, CONFIG_KEY: str(schedule)}
        (part / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        os.replace(part, out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"out {out}: can't be written ({error})") from error
    return schedule


def read_lora(folder: Path) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """The scale, and each adapted module's A [rank, in] and B [out, rank], by PEFT's names."""
    config = read_json(folder / "adapter_config.json")
    for key, allowed in _PLAIN.items():
        if config.get(key) not in allowed:
            got = f"{key} {config.get(key)!r}"
            raise UnsupportedError(f"adapter {folder}: expected plain LoRA, got {got}")
    rank = checks.integer("adapter r", config.get("r"), 1)
    alpha = float(checks.number("adapter lora_alpha", config.get("lora_alpha")))
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    found: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                match = _FACTOR.fullmatch(name)
                if match is None:
                    raise ValueError(f"{file}: expected lora_A and lora_B alone, got {name}")
                found.setdefault(match[1], {})[match[2]] = tensors.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged, or no safetensors file ({error})") from error
    for name, pair in found.items():
        if set(pair) != {"A", "B"} or not len(pair["A"]) == pair["B"].shape[-1] == rank:
            raise ValueError(f"{file}: {name}: expected A and B of rank {rank}")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return scale, {name: (pair["A"], pair["B"]) for name, pair in found.items()}
