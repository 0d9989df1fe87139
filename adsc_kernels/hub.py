"""A checkpoint's folder, local or on the hub, and the JSON files in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError


def find_folder(path_or_id: str | Path) -> Path:
    """A local folder, or the json and safetensors files of one on the hub; FileNotFoundError."""
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    try:
        patterns = ["*.json", "*.safetensors"]
        return Path(huggingface_hub.snapshot_download(str(path_or_id), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = f"no such folder, and none to be had from the hub ({str(error).strip()[:200]})"
        raise FileNotFoundError(f"{path_or_id}: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, or ValueError where the file holds no JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
