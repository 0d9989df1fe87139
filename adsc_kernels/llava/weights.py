"""Reading a checkpoint's weights: safetensors only, every name accounted for."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from adsc_kernels import adapters
from adsc_kernels.checks import shown
from adsc_kernels.hub import read_json

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
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def load_weights(
    model: nn.Module,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    adapter: Path | None = None,
) -> None:
    """Fill a model that lies on the meta device; `dtype=None` takes the token embedding's.

    adapter: the folder of one that is merged into the weights.

    Raises FileNotFoundError for a missing file; ValueError for a damaged one, and for weights that
    are missing, left over, there twice or of a wrong shape. Fills nothing unless all is well.
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
            _, shape = wanted.get(target, (name, tensor.shape))
            if tensor.shape != shape or tensor.dtype not in DTYPES:
                got = f"{tuple(tensor.shape)} of {tensor.dtype}"
                raise ValueError(f"{file}: {name}: expected floats {tuple(shape)}, got {got}")
            found[target] = tensor
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing:
        raise ValueError(f"{folder}: {len(missing)} weights are missing, {missing[0]} for one")
    embedding = found["language_model.embed_tokens.weight"]
    # Some write a tied head out once more.
    if extra and not (extra == ["lm_head.weight"] and torch.equal(found[extra[0]], embedding)):
        raise ValueError(f"{folder}: {len(extra)} weights are left over, {extra[0]} for one")
    dtype = dtype or embedding.dtype
    if adapter is not None:
        adapters.merge(found, adapter, _canonical)
    state = {name: found[target].to(dtype) for target, (name, _) in wanted.items()}
    model.load_state_dict(state, assign=True)


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
        raise ValueError(f"{index}: expected a weight_map, got {shown(shards)}")
    for name, shard in shards.items():
        # A plain name: the index of a stranger's checkpoint may not lead out of its folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            got = f"{shown(shard)} for {shown(name)}"
            raise ValueError(f"{index}: weight_map: expected names of safetensors files, got {got}")
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
