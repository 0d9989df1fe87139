"""What the thin model needs to know of a checkpoint, read from its config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import transformers

from adsc_kernels.errors import UnsupportedError
from adsc_kernels.hub import read_json


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
        raw = read_json(path)
        _expect(path, "model_type", raw.get("model_type"), "llava")
        _expect(path, "quantization_config", raw.get("quantization_config"), None)
        try:  # transformers fills in what a sparse text_config leaves out
            hf = transformers.LlavaConfig.from_dict(raw)
        except Exception as error:  # its validators raise types of their own
            raise ValueError(f"{path}: {error}") from error
        text, vision, layers = hf.text_config, hf.vision_config, hf.vision_feature_layer
        _expect(path, "text_config.model_type", text.model_type, "llama")
        _expect(path, "text_config.hidden_act", text.hidden_act, "silu")
        _expect(path, "vision_config.model_type", vision.model_type, "clip_vision_model")
        layers, depth = [layers] if isinstance(layers, int) else layers, vision.num_hidden_layers
        for name, fits in (
            ("num_key_value_heads", text.num_attention_heads % text.num_key_value_heads == 0),
            ("image_token_index", 0 <= hf.image_token_id < text.vocab_size),
            ("patch_size", 0 < vision.patch_size <= vision.image_size),
            ("vision_feature_layer", all(-depth - 1 <= n <= depth for n in layers)),
        ):
            if not fits:
                raise ValueError(f"{path}: {name} doesn't fit the other sizes")
        # longrope changes its frequencies past the length of its first training, when cached keys
        # are rotated already; `dynamic` scaling changes nothing up to max_position_embeddings.
        longest = text.max_position_embeddings
        if text.rope_parameters["rope_type"] == "longrope":
            longest = text.rope_parameters.get("original_max_position_embeddings") or longest
        grid = vision.image_size // vision.patch_size
        full = hf.vision_feature_select_strategy == "full"
        path = folder / "generation_config.json"
        stop = read_json(path).get("eos_token_id") if path.is_file() else None
        stop = text.eos_token_id if stop is None else stop
        return cls(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            vocab_size=text.vocab_size,
            max_positions=longest,
            image_token_id=hf.image_token_id,
            image_size=vision.image_size,
            grid=grid,
            tokens_per_image=grid**2 + full,
            keep_class_token=full,
            feature_layers=tuple(layers),
            stop_token_ids=() if stop is None else tuple([stop] if isinstance(stop, int) else stop),
            hf=hf,
        )


def _expect(path: Path, name: str, got: object, supported: object) -> None:
    if got != supported:
        raise UnsupportedError(f"{path}: {name}: expected {supported!r}, got {got!r}")
