"""What the thin model needs to know of a checkpoint, read from its config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from ..errors import UnsupportedError


@dataclass(frozen=True)
class LlavaConfig:
    """The sizes of a LLaVA-1.5 checkpoint; the rest is in transformers' own, `hf`."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied_head: bool
    image_token_id: int
    image_size: int
    patch_size: int
    vision_feature_layers: tuple[int, ...]
    keep_class_token: bool
    stop_token_ids: tuple[int, ...]
    hf: transformers.LlavaConfig

    @property
    def grid(self) -> int:
        """Patches along each side of a picture."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_image(self) -> int:
        """Rows that a picture takes in the decoder."""
        return self.grid**2 + self.keep_class_token

    @classmethod
    def from_folder(cls, folder: Path) -> LlavaConfig:
        """Raises FileNotFoundError, ValueError (damaged) or UnsupportedError (no LLaVA-1.5)."""
        path = folder / "config.json"
        raw = read_json(path)
        _expect(path, "model_type", raw.get("model_type"), "llava")
        _expect(path, "quantization_config", raw.get("quantization_config"), None)
        try:  # transformers fills in what a sparse text_config leaves out
            full = transformers.LlavaConfig.from_dict(raw)
        except Exception as error:  # its validators raise types of their own
            raise ValueError(f"{path}: {error}") from error
        text, vision, layers = full.text_config, full.vision_config, full.vision_feature_layer
        _expect(path, "text_config.model_type", text.model_type, "llama")
        _expect(path, "text_config.hidden_act", text.hidden_act, "silu")
        _expect(path, "vision_config.model_type", vision.model_type, "clip_vision_model")
        layers = (layers,) if isinstance(layers, int) else tuple(layers)
        depth = vision.num_hidden_layers
        for fits, problem in (
            (text.num_attention_heads % text.num_key_value_heads == 0, "num_key_value_heads"),
            (0 <= full.image_token_id < text.vocab_size, "image_token_index"),
            (0 < vision.patch_size <= vision.image_size, "patch_size"),
            (all(-depth - 1 <= n <= depth for n in layers), "vision_feature_layer"),
        ):
            if not fits:
                raise ValueError(f"{path}: {problem} doesn't fit the other sizes")
        return cls(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            vocab_size=text.vocab_size,
            max_positions=_max_positions(text),
            tied_head=full.tie_word_embeddings,
            image_token_id=full.image_token_id,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            vision_feature_layers=layers,
            keep_class_token=full.vision_feature_select_strategy == "full",
            stop_token_ids=_stop_tokens(folder, text),
            hf=full,
        )


def read_json(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, or ValueError where the file holds no JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def _expect(path: Path, name: str, got: object, supported: object) -> None:
    if got != supported:
        raise UnsupportedError(f"{path}: {name} must be {supported!r}, got {got!r}")


def _max_positions(text: transformers.LlamaConfig) -> int:
    """The longest conversation for which one fixed set of RoPE frequencies is right.

    `dynamic` scaling changes nothing up to max_position_embeddings. `longrope` changes frequencies
    past the length it was first trained at, which would leave the cached keys rotated wrongly.
    """
    longest: int = text.max_position_embeddings
    if text.rope_parameters["rope_type"] == "longrope":
        longest = text.rope_parameters.get("original_max_position_embeddings") or longest
    return longest


def _stop_tokens(folder: Path, text: transformers.LlamaConfig) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    found = text.eos_token_id if found is None else found
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)
