"""Finding a checkpoint and reading its weights: safetensors only, every name and shape accounted for."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from .config import read_json

# Our names are those of transformers 5 without the leading "model.". transformers 4 nested the
# decoder one deeper, and some versions put the CLIP tower into a "vision_model" of its own.
_RENAMES = (
    (re.compile(r"^language_model\.(lm_head\.)"), r"\1"),
    (re.compile(r"^language_model\.model\."), "language_model."),
    (re.compile(r"^model\.(language_model|vision_tower|multi_modal_projector)\."), r"\1."),
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
)
# Tables that old versions saved, and that follow from the config.
_DERIVED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


def find_folder(path_or_id: str | Path) -> Path:
    """A local folder, or one of the hub's: its json and safetensors files. FileNotFoundError."""
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    try:
        patterns = ["*.json", "*.safetensors"]
        return Path(huggingface_hub.snapshot_download(str(path_or_id), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{path_or_id}: no such folder, and not to be had from the hub ({reason})"
        ) from error


def load_weights(
    model: nn.Module, folder: Path, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Fill a model that lies on the meta device; `dtype=None` takes the token embedding's.

    Raises FileNotFoundError for a missing file; ValueError for a damaged one, and for weights that
    are missing, left over, there twice or of another shape. The model is filled only if all is well.
    """
    wanted = {_canonical(name): (name, p.shape) for name, p in model.named_parameters()}
    found: dict[str, Tensor] = {}
    files = _files(folder)
    for file in tqdm(files, desc="weights", unit="file", disable=len(files) == 1):
        for name, tensor in _read(file, device).items():
            target = _canonical(name)
            if _DERIVED.search(target):
                continue
            if target in found:
                raise ValueError(f"{file}: {name} is there twice")
            if target in wanted and tensor.shape != wanted[target][1]:
                expected, got = tuple(wanted[target][1]), tuple(tensor.shape)
                raise ValueError(f"{file}: {name} must be {expected}, got {got}")
            if not tensor.is_floating_point() or tensor.element_size() == 1:
                raise ValueError(f"{file}: {name} must be 16- or 32-bit float, got {tensor.dtype}")
            found[target] = tensor
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise ValueError(f"{folder}: {len(missing)} weights are missing, {missing[0]} for one")
    embedding = found["language_model.embed_tokens.weight"]
    extra = sorted(found.keys() - wanted.keys())
    if extra == ["lm_head.weight"] and torch.equal(found["lm_head.weight"], embedding):
        extra = []  # a tied head, written out once more
    if extra:
        raise ValueError(f"{folder}: {len(extra)} weights are left over, {extra[0]} for one")
    dtype = dtype or embedding.dtype
    model.load_state_dict(
        {name: found[t].to(dtype) for t, (name, _) in wanted.items()}, assign=True
    )


def _canonical(name: str) -> str:
    """A weight's name in any version, as the thin model calls it."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{folder}: neither {single.name} nor {index.name} is there")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index}: must hold a weight_map")
    files = [folder / name for name in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, though {index.name} names it")
    return files


def _read(file: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt", device=str(device)) as weights:
            return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged, or no safetensors file ({error})") from error
