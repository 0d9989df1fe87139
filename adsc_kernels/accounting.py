"""What a schedule costs and saves: multiply-accumulates and KV-cache bytes. No tensors here.

Published numbers in this field differ in what they count, so every number here is given under a
named convention. One MAC is one multiply-accumulate (two FLOPs).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from adsc_kernels.schedule import CompressionSchedule

KNOWN_DECODERS = ("llama",)
KNOWN_TOWER = "clip_vision_model"
DEFAULT_CONVENTION = "processed"
CONVENTIONS = {
    "processed": "every matrix product that runs: projections, causal scores and values over real "
    "lengths, SwiGLU's three matrices, the head on last positions, vision tower and projector",
}


@dataclass(frozen=True)
class TowerShape:
    """A CLIP vision tower and the two-layer projector behind it, as seen by one image."""

    num_layers: int  # layers that run, which may be fewer than the checkpoint holds
    hidden_size: int
    intermediate_size: int
    num_patches: int
    patch_elements: int  # channels * height * width of a patch
    num_features: int = 1  # layers whose outputs are put side by side for the projector

    def macs(self) -> int:
        """MACs for one image; full attention over the patches and the class token."""
        tokens, width = self.num_patches + 1, self.hidden_size
        layer = 4 * tokens * width**2 + 2 * tokens**2 * width
        layer += 2 * tokens * width * self.intermediate_size
        return self.num_patches * self.patch_elements * width + self.num_layers * layer


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide what a decoder (and its tower, if any) costs."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tower: TowerShape | None = None

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """From ``adsc_kernels.llava``'s config, or a transformers LLaVA or Llama config.

        Raises ``ValueError`` where the config holds no decoder or tower of a known form.
        """
        config = getattr(config, "hf", config)
        text = getattr(config, "text_config", config)
        vision = getattr(config, "vision_config", None)
        if getattr(text, "model_type", None) not in KNOWN_DECODERS:
            raise ValueError(
                f"config: expected a decoder of type {', '.join(KNOWN_DECODERS)}, "
                f"got {getattr(text, 'model_type', type(text).__name__)!r}"
            )
        return cls(
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            intermediate_size=text.intermediate_size,
            vocab_size=text.vocab_size,
            tower=None if vision is None else _tower(config, vision),
        )

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """K and V of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * element_bytes

    def projector_macs(self) -> int:
        """LLaVA-1.5's projector on one image: features to hidden size, then hidden to hidden."""
        if self.tower is None:
            return 0
        inner = self.tower.num_features * self.tower.hidden_size + self.hidden_size
        return self.tower.num_patches * inner * self.hidden_size


def _tower(config: Any, vision: Any) -> TowerShape:
    if getattr(vision, "model_type", None) != KNOWN_TOWER:
        raise ValueError(f"config: expected a tower of type {KNOWN_TOWER}, got {vision!r:.60}")
    features = config.vision_feature_layer
    side = vision.image_size // vision.patch_size
    return TowerShape(
        num_layers=vision.num_hidden_layers,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_patches=side * side,
        patch_elements=vision.num_channels * vision.patch_size**2,
        num_features=1 if isinstance(features, int) else len(features),
    )


@dataclass(frozen=True)
class StageAccount:
    """One stage: its layers, its rows after the prompt, and what its layers cost together."""

    layers: range
    rows: int  # over all sequences, before any decoded token
    projection_macs: int
    score_macs: int
    ffn_macs: int
    kv_bytes: int

    @property
    def macs(self) -> int:
        """All of the stage's layers."""
        return self.projection_macs + self.score_macs + self.ffn_macs


@dataclass(frozen=True)
class Account:
    """The whole model: stages, and what is outside the decoder layers."""

    convention: str
    stages: tuple[StageAccount, ...]
    head_macs: int
    tower_macs: int
    projector_macs: int

    @property
    def decoder_macs(self) -> int:
        """The decoder layers alone."""
        return sum(stage.macs for stage in self.stages)

    @property
    def macs(self) -> int:
        """All that the convention counts."""
        return self.decoder_macs + self.head_macs + self.tower_macs + self.projector_macs

    @property
    def kv_bytes(self) -> int:
        """K and V of all layers."""
        return sum(stage.kv_bytes for stage in self.stages)


def account(
    shape: ModelShape,
    schedule: CompressionSchedule,
    text_tokens: int,
    vision_tokens: int,
    decode_tokens: int = 0,
    *,
    grid: tuple[int, int] | None = None,
    element_bytes: int = 2,
    convention: str = DEFAULT_CONVENTION,
) -> Account:
    """Account for one prompt of ``text_tokens`` and one image of ``vision_tokens``.

    ``grid`` is the image's (height, width) in tokens, for the grid pattern. ``decode_tokens``,
    ``element_bytes`` and ``convention`` are as in :func:`account_lengths`. Raises ``ValueError``
    for a negative count or a schedule for another depth.
    """
    for name, count in (("text_tokens", text_tokens), ("vision_tokens", vision_tokens)):
        if count < 0:
            raise ValueError(f"{name}: expected at least 0, got {count}")
    height, width = grid or (None, None)
    return account_lengths(
        shape,
        schedule,
        [(text_tokens + kept,) for kept in schedule.kept(vision_tokens, height, width)],
        num_images=int(vision_tokens > 0),
        decode_tokens=decode_tokens,
        element_bytes=element_bytes,
        convention=convention,
    )


def account_lengths(
    shape: ModelShape,
    schedule: CompressionSchedule,
    seq_lens: Sequence[Iterable[int]],
    *,
    num_images: int,
    decode_tokens: int = 0,
    element_bytes: int = 2,
    convention: str = DEFAULT_CONVENTION,
) -> Account:
    """Account for a ragged batch whose real lengths are known for every stage.

    ``seq_lens[s]`` holds each sequence's rows in stage ``s``: with a plan of whole prompts it is
    ``[stage.seq_lens for stage in plan.stages]``. ``decode_tokens`` are tokens that each sequence
    runs through the decoder one at a time after its prompt; their K and V count too.
    ``element_bytes`` is the size of one cache element. Raises ``ValueError`` where the arguments
    don't fit together.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: expected one of {tuple(CONVENTIONS)}, got {convention!r}")
    if schedule.num_layers != shape.num_layers:
        raise ValueError(
            f"schedule: expected one for {shape.num_layers} layers, got {schedule.num_layers}"
        )
    if len(seq_lens) != schedule.num_stages:
        raise ValueError(f"seq_lens: expected {schedule.num_stages} stages, got {len(seq_lens)}")
    if decode_tokens < 0 or num_images < 0 or element_bytes < 1:
        raise ValueError(
            "decode_tokens, num_images, element_bytes: expected at least 0, 0 and 1, "
            f"got {decode_tokens}, {num_images} and {element_bytes}"
        )
    stages = []
    for index, lengths in enumerate(map(tuple, seq_lens)):
        layers = schedule.layers_of_stage(index)
        stages.append(_stage(shape, layers, lengths, decode_tokens, element_bytes))
    sequences = len(tuple(seq_lens[0]))
    return Account(
        convention=convention,
        stages=tuple(stages),
        head_macs=sequences * (1 + decode_tokens) * shape.hidden_size * shape.vocab_size,
        tower_macs=num_images * (0 if shape.tower is None else shape.tower.macs()),
        projector_macs=num_images * shape.projector_macs(),
    )


def _stage(
    shape: ModelShape,
    layers: range,
    lengths: tuple[int, ...],
    decode_tokens: int,
    element_bytes: int,
) -> StageAccount:
    depth, rows = len(layers), sum(lengths)
    processed = rows + len(lengths) * decode_tokens
    # Token t of a sequence attends to t + 1 keys; decoded tokens go on from the stage's own length.
    attended = sum(_triangle(length + decode_tokens) for length in lengths)
    query_width = shape.num_heads * shape.head_dim
    kv_width = shape.num_kv_heads * shape.head_dim
    return StageAccount(
        layers=layers,
        rows=rows,
        projection_macs=depth * processed * shape.hidden_size * 2 * (query_width + kv_width),
        score_macs=depth * attended * 2 * query_width,
        ffn_macs=depth * processed * 3 * shape.hidden_size * shape.intermediate_size,
        kv_bytes=depth * processed * shape.kv_bytes_per_token(element_bytes),
    )


def _triangle(length: int) -> int:
    return length * (length + 1) // 2
