"""The sizes of a model that decide what it costs: from a preset, a config, a folder or the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adsc_kernels import checks
from adsc_kernels.accounting.tower import (
    TowerShape,
    clip,
    internvit,
    qwen2_5_vit,
    siglip,
    tower_from_config,
)
from adsc_kernels.hub import read_config
from adsc_kernels.schedule import MAX_LAYERS

# Decoders of the Llama kind: RMSNorm before attention and before a SwiGLU of three matrices, RoPE.
KNOWN_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "qwen2_5_vl_text")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder, and of the vision tower before it, if any."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tower: TowerShape | None = None
    ffn_matrices: int = 3
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each head's query and key
    tied: bool = False  # the head is the token embedding

    def __post_init__(self) -> None:
        names = "num_layers hidden_size num_heads num_kv_heads head_dim intermediate_size"
        checked = {name: getattr(self, name) for name in names.split()}
        checked |= {"vocab_size": self.vocab_size, "ffn_matrices": self.ffn_matrices}
        for name, size in checked.items():
            checks.integer(name, size, 1, MAX_LAYERS if name == "num_layers" else checks.INT64_MAX)
        for name in ("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "tied"):
            checks.flag(name, getattr(self, name))
        if self.tower is not None:
            checks.instance("tower", self.tower, TowerShape)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {self.num_heads}, "
                f"got {self.num_kv_heads}"
            )

    @property
    def query_width(self) -> int:
        """Elements of a row's queries in one layer."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of a row's keys, and as many of its values, in one layer."""
        return self.num_kv_heads * self.head_dim

    @classmethod
    def preset(cls, name: str) -> ModelShape:
        """A model of :data:`MODELS` by its name: ``llava-1.5-7b``; nothing is downloaded."""
        return MODELS[checks.choice("model", name, MODELS)]

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path) -> ModelShape:
        """From the config.json of a folder, or of a model on the hub (that one file is fetched).

        Raises ``FileNotFoundError`` where there is none, ``ValueError`` where its kind is unknown.
        """
        file = _config_file(checks.path("model", path_or_id))
        read_config(file)
        from transformers import AutoConfig

        try:
            return cls.from_config(AutoConfig.from_pretrained(str(file.parent)))
        except Exception as error:  # transformers' validators raise types of their own
            raise ValueError(f"{file}: {' '.join(str(error).split())}") from error

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """From a transformers config (LLaVA-1.5, LLaVA-NeXT, OneVision, Qwen2.5-VL, InternVL, or a
        decoder alone), or that of ``adsc_kernels.llava``.

        Raises ``ValueError`` where the config holds no decoder or tower of a known form.
        """
        config = getattr(config, "hf", config)
        text = getattr(config, "text_config", config)
        kind = getattr(text, "model_type", None)
        if kind not in KNOWN_DECODERS:
            raise ValueError(
                f"config: expected a decoder of type {', '.join(KNOWN_DECODERS)}, "
                f"got {kind or type(text).__name__!r}"
            )
        if "sliding_attention" in (getattr(text, "layer_types", None) or ()) or (
            kind == "mistral" and text.sliding_window is not None
        ):
            raise ValueError("config: expected full attention in every layer, got sliding windows")
        # Qwen2's biases are part of the architecture; Llama's and Qwen3's config says.
        always = kind in ("qwen2", "qwen2_5_vl_text")
        bias = bool(getattr(text, "attention_bias", False))
        return cls(
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None)
            or text.hidden_size // text.num_attention_heads,
            intermediate_size=text.intermediate_size,
            vocab_size=text.vocab_size,
            tower=tower_from_config(config) if hasattr(config, "vision_config") else None,
            qkv_bias=always or bias,
            out_bias=bias and not always,
            mlp_bias=bool(getattr(text, "mlp_bias", False)),
            qk_norm=kind == "qwen3",
            tied=bool(config.tie_word_embeddings),
        )


def _config_file(model: Path) -> Path:
    """The config.json of a folder, or of a model on the hub, fetched."""
    if model.is_dir():
        file, reason = model / "config.json", "no config.json in it"
        if file.is_file():
            return file
    else:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            return Path(huggingface_hub.hf_hub_download(str(model), "config.json"))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
    raise FileNotFoundError(
        f"model: expected one of {', '.join(MODELS)}, a folder with a config.json or an id on the "
        f"hub, got {str(model)!r} ({reason})"
    )


def _clip_l(decoder: int, newline: bool = False) -> TowerShape:
    """CLIP ViT-L/14 at 336 pixels: 24 x 24 patches."""
    return clip(
        layers=24, width=1024, inner=4096, patch=14, side=24, decoder=decoder, newline=newline
    )


def _siglip_so400m(decoder: int) -> TowerShape:
    """SigLIP so400m/14 at 384 pixels without its last layer: 27 x 27 patches."""
    return siglip(
        layers=26, width=1152, inner=4304, patch=14, side=27, decoder=decoder, newline=True
    )


def _internvit_300m(decoder: int) -> TowerShape:
    """InternViT-300M at 448 pixels: 32 x 32 patches, 256 rows."""
    return internvit(
        layers=24, width=1024, inner=4096, patch=14, grid=(32, 32), merge=2, decoder=decoder
    )


def _qwen_vit(decoder: int) -> TowerShape:
    return qwen2_5_vit(
        layers=32,
        width=1280,
        inner=3420,
        patch=14,
        frames=2,
        merge=2,
        window=112,
        full_layers=4,
        decoder=decoder,
    )


# By name, in the sizes of the checkpoints on the hub that transformers reads ("...-hf").
MODELS = {
    "llava-1.5-7b": ModelShape(32, 4096, 32, 32, 128, 11008, 32064, _clip_l(4096)),
    "llava-1.5-13b": ModelShape(40, 5120, 40, 40, 128, 13824, 32064, _clip_l(5120)),
    "llava-next-vicuna-7b": ModelShape(32, 4096, 32, 32, 128, 11008, 32064, _clip_l(4096, True)),
    "llava-next-vicuna-13b": ModelShape(40, 5120, 40, 40, 128, 13824, 32064, _clip_l(5120, True)),
    "llava-next-mistral-7b": ModelShape(32, 4096, 32, 8, 128, 14336, 32064, _clip_l(4096, True)),
    "llava-onevision-7b": ModelShape(
        28, 3584, 28, 4, 128, 18944, 152128, _siglip_so400m(3584), qkv_bias=True
    ),
    "qwen2.5-vl-3b": ModelShape(
        36, 2048, 16, 2, 128, 11008, 151936, _qwen_vit(2048), qkv_bias=True, tied=True
    ),
    "qwen2.5-vl-7b": ModelShape(
        28, 3584, 28, 4, 128, 18944, 152064, _qwen_vit(3584), qkv_bias=True
    ),
    "internvl3-8b": ModelShape(
        28, 3584, 28, 4, 128, 18944, 151674, _internvit_300m(3584), qkv_bias=True
    ),
    "internvl3-14b": ModelShape(
        48, 5120, 40, 8, 128, 13824, 151674, _internvit_300m(5120), qkv_bias=True
    ),
}
