"""What the thin model needs to know of a checkpoint, read from its config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from adsc_kernels import checks
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.hub import count_of, expect, read_config, read_json
from adsc_kernels.schedule import MAX_LAYERS

MAX_TOKENS_PER_IMAGE = 2**20
_BLOCK = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
_SIZES = {
    "text_config": (*_BLOCK, "num_key_value_heads", "head_dim", "vocab_size")
    + ("max_position_embeddings",),
    "vision_config": (*_BLOCK, "num_channels", "image_size", "patch_size"),
}


@dataclass(frozen=True)
class LlavaConfig:
    """The sizes of a LLaVA-1.5 checkpoint; `hf` is transformers' own config, with all the rest."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    image_token_id: int
    image_size: int
    grid: int  # patches along each side of a picture
    tokens_per_image: int  # rows that a picture takes in the decoder
    keep_class_token: bool  # it is one of these rows
    feature_layers: tuple[int, ...]  # of the vision tower
    stop_token_ids: tuple[int, ...]
    hf: transformers.LlavaConfig

    @classmethod
    def from_folder(cls, folder: Path) -> LlavaConfig:
        """Raises FileNotFoundError, ValueError (damaged) or UnsupportedError (no LLaVA-1.5)."""
        path = folder / "config.json"
        raw = read_config(path)
        expect(path, "model_type", raw.get("model_type"), "llava")
        expect(path, "quantization_config", raw.get("quantization_config"), None)
        _check_sizes(path, raw)
        try:  # transformers fills in what a sparse text_config leaves out
            hf = transformers.LlavaConfig.from_dict(raw)
        except Exception as error:  # its validators raise types of their own
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
        text, vision = hf.text_config, hf.vision_config
        expect(path, "text_config.model_type", text.model_type, "llama")
        expect(path, "text_config.hidden_act", text.hidden_act, "silu")
        expect(path, "vision_config.model_type", vision.model_type, "clip_vision_model")
        layers = _feature_layers(path, hf)
        _check_fit(path, hf)
        grid = vision.image_size // vision.patch_size
        full = hf.vision_feature_select_strategy == "full"
        return cls(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            vocab_size=text.vocab_size,
            max_positions=_longest(path, text),
            image_token_id=hf.image_token_id,
            image_size=vision.image_size,
            grid=grid,
            tokens_per_image=grid**2 + full,
            keep_class_token=full,
            feature_layers=layers,
            stop_token_ids=_stop_tokens(folder, text),
            hf=hf,
        )


def _feature_layers(path: Path, hf: transformers.LlavaConfig) -> tuple[int, ...]:
    layers, depth = hf.vision_feature_layer, hf.vision_config.num_hidden_layers
    layers = layers if isinstance(layers, list | tuple) else [layers]
    if not layers:
        raise ValueError(f"{path}: vision_feature_layer: expected at least one layer, got none")
    return tuple(count_of(path, "vision_feature_layer", n, -depth - 1, depth) for n in layers)


def _check_sizes(path: Path, raw: dict[str, Any]) -> None:
    """What the file itself says, before transformers computes with it."""
    for part, sizes in _SIZES.items():
        config = raw.get(part, {})
        if not isinstance(config, dict):
            raise ValueError(f"{path}: {part}: expected an object, got {checks.shown(config)}")
        for name in sizes:
            derived = name in ("num_key_value_heads", "head_dim") and config.get(name) is None
            if name in config and not derived:
                most = MAX_LAYERS if name == "num_hidden_layers" else checks.INT32_MAX
                count_of(path, f"{part}.{name}", config[name], 1, most)


def _check_fit(path: Path, hf: transformers.LlavaConfig) -> None:
    text, vision = hf.text_config, hf.vision_config
    count_of(path, "image_token_index", hf.image_token_id, 0, text.vocab_size - 1)
    for name, fits in (
        ("num_key_value_heads", text.num_attention_heads % text.num_key_value_heads == 0),
        ("patch_size", vision.patch_size <= vision.image_size),
        ("image_size", (vision.image_size // vision.patch_size) ** 2 <= MAX_TOKENS_PER_IMAGE),
    ):
        if not fits:
            raise ValueError(f"{path}: {name} doesn't fit the other sizes")


def _longest(path: Path, text: transformers.LlamaConfig) -> int:
    """Up to where positions rotate alike whenever they are asked for.

    longrope changes its frequencies past the length of its first training, when cached keys are
    rotated already; `dynamic` scaling changes nothing up to max_position_embeddings.
    """
    rope, known = text.rope_parameters, ("default", *ROPE_INIT_FUNCTIONS)
    if rope["rope_type"] not in known:
        got = checks.shown(rope["rope_type"])
        raise UnsupportedError(f"{path}: rope_type: expected one of {', '.join(known)}, got {got}")
    longest = text.max_position_embeddings
    if rope["rope_type"] == "longrope":
        first = rope.get("original_max_position_embeddings") or longest
        return count_of(path, "original_max_position_embeddings", first, 1, checks.INT32_MAX)
    return longest


def _stop_tokens(folder: Path, text: transformers.LlamaConfig) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    stop = read_json(path).get("eos_token_id") if path.is_file() else None
    if stop is None:
        path, stop = folder / "config.json", text.eos_token_id
    tokens = stop if isinstance(stop, list | tuple) else [] if stop is None else [stop]
    return tuple(count_of(path, "eos_token_id", token, 0, text.vocab_size - 1) for token in tokens)
