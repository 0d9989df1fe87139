"""Reading a checkpoint's weights: safetensors only, every name accounted for."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from adsc_kernels import adapters
from adsc_kernels.hub import plain_name, read_weights, weight_files

# Tables that old versions saved, and that follow from the config.
_DERIVED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Joined(nn.Linear):
    """Linear maps of the same rows in one GEMM; parts: their names in checkpoints, and columns."""

    def __init__(self, width: int, parts: dict[str, int], bias: bool) -> None:
        super().__init__(width, sum(parts.values()), bias)
        self.parts = parts


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
    sources = _sources(model)
    wanted = {plain_name(name): (name, at) for s in sources.values() for name, at in s.items()}
    found: dict[str, Tensor] = {}
    files = weight_files(folder)
    for file in tqdm(files, desc="weights", unit="file", disable=len(files) == 1):
        for name, tensor in read_weights(file, device).items():
            target = plain_name(name)
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
    # Here every weight passes by its checkpoint's name, checked and not joined yet.
    if adapter is not None:
        adapters.merge(found, adapter, plain_name)
    state: dict[str, Tensor] = {}
    for name, parts in sources.items():
        tensors = [found.pop(plain_name(part)).to(dtype) for part in parts]
        state[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    model.load_state_dict(state, assign=True)


def _sources(model: nn.Module) -> dict[str, dict[str, torch.Size]]:
    """For each parameter the checkpoint's weights that it is made of, with their shapes."""
    sources = {}
    for path, module in model.named_modules():
        for name, p in module.named_parameters(path, recurse=False):
            parts, end = {name: p.shape}, name.removeprefix(path)
            if isinstance(module, Joined):
                above = path.rpartition(".")[0]
                shapes = {part: torch.Size((n, *p.shape[1:])) for part, n in module.parts.items()}
                parts = {f"{above}.{part}{end}": shape for part, shape in shapes.items()}
            sources[name] = parts
    return sources
