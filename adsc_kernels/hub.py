"""A checkpoint's folder, local or on the hub, and the files in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adsc_kernels import checks
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.schedule import MAX_LAYERS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MOST_BYTES = 2**26  # of a JSON file: an index of a thousand shards is a hundredth of that
MOST_DEPTH = 64  # of lists and objects in one another, where Python's own limit is a crash's
# Our names are those of transformers 5 without the leading "model.". transformers 4 nested the
# decoder one deeper, and some versions put the CLIP tower into a "vision_model" of its own.
_RENAMES = (
    (re.compile(r"^language_model\.(lm_head\.)"), r"\1"),
    (re.compile(r"^language_model\.model\."), "language_model."),
    (re.compile(r"^model\.(language_model|vision_tower|multi_modal_projector)\."), r"\1."),
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
)
_NUMBER = re.compile(r"-?[0-9]{1,400}")


def bundled_checkpoint() -> Path:
    """The folder of tiny-llava-digits, the checkpoint that comes with the package."""
    return Path(__file__).parent / "checkpoints" / "tiny-llava-digits"


def find_folder(path_or_id: str | Path) -> Path:
    """A local folder, or the json and safetensors files of one on the hub; FileNotFoundError."""
    local = checks.path("path_or_id", path_or_id)
    if local.is_dir():
        return local
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        patterns = ["*.json", "*.safetensors"]
        return Path(huggingface_hub.snapshot_download(str(path_or_id), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = f"no such folder, and none to be had from the hub ({str(error).strip()[:200]})"
        raise FileNotFoundError(f"{path_or_id}: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, or ValueError where the file holds no JSON object, or one that is
    too large, too deep, or of numbers too long to be anyone's settings.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path}: expected at most {MOST_BYTES} bytes of JSON, got {size}")
    try:
        text = path.read_text(encoding="utf-8")
        if _depth(text) > MOST_DEPTH:
            raise ValueError(f"more than {MOST_DEPTH} levels deep")
        value = json.loads(text, parse_int=_integer)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_config(path: Path) -> dict[str, Any]:
    """:func:`read_json` of a config.json, whose layers transformers may list, however many."""
    config = read_json(path)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in ("num_hidden_layers", "depth"):
            if isinstance(part.get(name), int) and part[name] > MAX_LAYERS:
                got = checks.shown(part[name])
                raise ValueError(f"{path}: {name}: expected at most {MAX_LAYERS}, got {got}")
    return config


def _depth(text: str) -> int:
    """How deep lists and objects lie in one another, brackets inside of texts left out."""
    depth = deepest = 0
    for mark in re.findall(r"[\[{\]}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
        depth += 1 if mark in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _integer(digits: str) -> int:
    if _NUMBER.fullmatch(digits) is None:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; FileNotFoundError, or ValueError for a bad index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{folder}: neither {single.name} nor {index.name} is there")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index}: expected a weight_map, got {checks.shown(shards)}")
    for name, shard in shards.items():
        # A plain name: the index of a stranger's checkpoint may not lead out of its folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            got = f"{checks.shown(shard)} for {checks.shown(name)}"
            raise ValueError(f"{index}: weight_map: expected names of safetensors files, got {got}")
    files = [folder / name for name in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, though {index.name} names it")
    return files


def read_weights(file: Path, device: torch.device) -> dict[str, Tensor]:
    """What a safetensors file holds, by name; ValueError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device=str(device)) as weights:
            return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged, or no safetensors file ({error})") from error


def plain_name(name: str) -> str:
    """A weight's name in any version, as the thin model calls it."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def count_of(path: Path, name: str, value: object, least: int, most: int) -> int:
    """A file's int; what is wrong with it is always a ValueError, since it is the file's."""
    try:
        return checks.integer(name, value, least, most)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def expect(path: Path, name: str, got: object, supported: object) -> None:
    """Raises UnsupportedError where a file says something else than what is supported."""
    if got != supported:
        raise UnsupportedError(f"{path}: {name}: expected {supported!r}, got {got!r}")
