"""The sizes of vision towers and their projectors: CLIP, SigLIP, Qwen2.5-VL, InternVL."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from adsc_kernels.checks import at_least


@dataclass(frozen=True)
class TowerShape:
    """A vision tower and the projector behind it, as one tile runs through them.

    A tile is one picture for the tower: the whole image, one crop of it (LLaVA-NeXT, OneVision,
    InternVL) or one frame. Towers with ``grid`` None take tiles of any size (Qwen2.5-VL).
    """

    num_layers: int  # layers that run
    hidden_size: int
    intermediate_size: int
    ffn_matrices: int
    patch_elements: int  # channels * frames * height * width of a patch
    grid: tuple[int, int] | None  # patches down and across
    class_token: bool  # one row more beside the patches
    projector: tuple[int, ...]  # widths of its layers, from its input to the decoder's width
    weights: int  # parameters of the tower, tables and biases too
    projector_weights: int
    keep_class_token: bool = False  # it goes on to the decoder
    merge: int = 1  # patches, down and across, that become one row of the decoder
    window: int | None = None  # side of an attention window, in rows of the decoder
    full_layers: int = 0  # layers that attend to the whole tile in spite of the window

    def __post_init__(self) -> None:
        names = ("num_layers", "hidden_size", "intermediate_size", "ffn_matrices", "merge")
        at_least(1, **{name: getattr(self, name) for name in names})
        at_least(1, patch_elements=self.patch_elements)

    @property
    def tokens(self) -> int | None:
        """Rows that a tile takes in the decoder; None where the tile's size decides."""
        return None if self.grid is None else self._rows(self.grid)

    def macs(self, token_grid: tuple[int, int] | None = None, scores: bool = True) -> int:
        """Matrix products for one tile: patch embedding, and layers with full or windowed scores.

        ``token_grid``: the tile's size in rows of the decoder, needed where ``grid`` is None.
        ``scores``: False leaves them out.
        """
        down, across = self._patches(token_grid)
        rows, width = down * across + self.class_token, self.hidden_size
        layer = 4 * rows * width**2 + self.ffn_matrices * rows * width * self.intermediate_size
        pairs = self.num_layers * rows**2
        if self.window is not None:
            side = self.window * self.merge
            heights, widths = _pieces(down, side), _pieces(across, side)
            windowed = sum(h * h for h in heights) * sum(w * w for w in widths)
            pairs = self.full_layers * rows**2 + (self.num_layers - self.full_layers) * windowed
        embedding = down * across * self.patch_elements * width
        return embedding + self.num_layers * layer + 2 * pairs * width * scores

    def projector_macs(self, token_grid: tuple[int, int] | None = None) -> int:
        """Matrix products of the projector for one tile; ``token_grid`` as for :meth:`macs`."""
        rows = self._rows(self._patches(token_grid))
        return rows * sum(a * b for a, b in pairwise(self.projector))

    def _patches(self, token_grid: tuple[int, int] | None) -> tuple[int, int]:
        if self.grid is not None:
            return self.grid
        if token_grid is None:
            raise ValueError(
                "grid: expected (height, width) in tokens for a tower that takes any size, got None"
            )
        down, across = token_grid
        return down * self.merge, across * self.merge

    def _rows(self, patches: tuple[int, int]) -> int:
        down, across = patches
        return down * across // self.merge**2 + self.keep_class_token


def _pieces(length: int, size: int) -> list[int]:
    return [min(size, length - start) for start in range(0, length, size)]


def clip(
    *,
    layers: int,
    width: int,
    inner: int,
    patch: int,
    side: int,
    decoder: int,
    features: int = 1,
    channels: int = 3,
    full: bool = False,
    newline: bool = False,
    projector_bias: bool = True,
) -> TowerShape:
    """CLIP behind LLaVA's two-layer projector. ``side``: patches along an edge; ``features``:
    layers whose outputs go side by side into the projector; ``full``: with the class token;
    ``newline``: the model learnt a row that ends each line of patches."""
    elements, rows = channels * patch**2, side**2 + 1
    tables = width + rows * width + 4 * width  # class token, positions, the norms before and after
    return TowerShape(
        num_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        ffn_matrices=2,
        patch_elements=elements,
        grid=(side, side),
        class_token=True,
        projector=(features * width, decoder, decoder),
        weights=elements * width + tables + layers * _block(width, inner),
        projector_weights=_mlp((features * width, decoder, decoder), projector_bias)
        + decoder * newline,
        keep_class_token=full,
    )


def siglip(
    *,
    layers: int,
    width: int,
    inner: int,
    patch: int,
    side: int,
    decoder: int,
    features: int = 1,
    channels: int = 3,
    newline: bool = False,
    projector_bias: bool = True,
) -> TowerShape:
    """SigLIP without its pooling head, behind LLaVA's projector; arguments as for :func:`clip`."""
    elements = channels * patch**2
    tables = width + side**2 * width + 2 * width  # patch bias, positions, the norm after
    return TowerShape(
        num_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        ffn_matrices=2,
        patch_elements=elements,
        grid=(side, side),
        class_token=False,
        projector=(features * width, decoder, decoder),
        weights=elements * width + tables + layers * _block(width, inner),
        projector_weights=_mlp((features * width, decoder, decoder), projector_bias)
        + decoder * newline,
    )


def internvit(
    *,
    layers: int,
    width: int,
    inner: int,
    patch: int,
    grid: tuple[int, int],
    merge: int,
    decoder: int,
    channels: int = 3,
    qkv_bias: bool = True,
    qk_norm: bool = False,
    norm_bias: bool = True,
    final_norm: bool = False,
) -> TowerShape:
    """InternViT, whose ``merge`` x ``merge`` neighbours are one row for InternVL's projector."""
    elements, rows, merged = channels * patch**2, grid[0] * grid[1] + 1, width * merge**2
    block = _block(width, inner) + 2 * width + 2 * width * qk_norm  # a scale on each branch
    block -= 3 * width * (not qkv_bias) + 2 * width * (not norm_bias)
    # Class token, patch bias, positions, and where features aren't the patches' mean a last norm.
    tables = 2 * width + rows * width + 2 * width * final_norm
    return TowerShape(
        num_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        ffn_matrices=2,
        patch_elements=elements,
        grid=grid,
        class_token=True,
        projector=(merged, decoder, decoder),
        weights=elements * width + tables + layers * block,
        projector_weights=2 * merged + _mlp((merged, decoder, decoder), True),
        merge=merge,
    )


def qwen2_5_vit(
    *,
    layers: int,
    width: int,
    inner: int,
    patch: int,
    frames: int,
    merge: int,
    window: int,
    full_layers: int,
    decoder: int,
    channels: int = 3,
) -> TowerShape:
    """Qwen2.5-VL's tower: any size, windowed attention in most layers, SwiGLU, RMSNorm.

    ``window`` is a side in pixels; ``frames`` go into one patch. Its merger is the projector.
    """
    elements, merged = channels * frames * patch**2, width * merge**2
    block = 2 * width + 4 * width**2 + 4 * width + 3 * width * inner + 2 * inner + width
    return TowerShape(
        num_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        ffn_matrices=3,
        patch_elements=elements,
        grid=None,
        class_token=False,
        projector=(merged, merged, decoder),
        weights=elements * width + layers * block,
        projector_weights=width + _mlp((merged, merged, decoder), True),
        merge=merge,
        window=window // patch // merge,
        full_layers=full_layers,
    )


def _block(width: int, inner: int) -> int:
    """Parameters of a ViT layer: two norms, four projections, two FFN matrices, with biases."""
    return 4 * width + _mlp((width,) * 5, True) + _mlp((width, inner, width), True)


def _mlp(widths: tuple[int, ...], bias: bool) -> int:
    return sum(a * b + b * bias for a, b in pairwise(widths))


def tower_from_config(config: Any) -> TowerShape:
    """The tower of a transformers config that has a ``vision_config``.

    Raises ``ValueError`` for a tower of no known form.
    """
    vision, decoder = config.vision_config, config.text_config.hidden_size
    kind = getattr(vision, "model_type", None)
    if kind in ("clip_vision_model", "siglip_vision_model"):
        sizes: dict[str, Any] = dict(
            layers=vision.num_hidden_layers,
            width=vision.hidden_size,
            inner=vision.intermediate_size,
            patch=vision.patch_size,
            side=vision.image_size // vision.patch_size,
            decoder=decoder,
            features=_feature_layers(config),
            channels=vision.num_channels,
            newline=hasattr(config, "image_grid_pinpoints"),
            projector_bias=config.multimodal_projector_bias,
        )
        if kind == "siglip_vision_model":
            return siglip(**sizes)
        return clip(**sizes, full=config.vision_feature_select_strategy == "full")
    if kind == "internvl_vision":
        (height, width), (patch, _) = vision.image_size, vision.patch_size
        return internvit(
            layers=vision.num_hidden_layers,
            width=vision.hidden_size,
            inner=vision.intermediate_size,
            patch=patch,
            grid=(height // patch, width // patch),
            merge=round(1 / config.downsample_ratio),
            decoder=decoder,
            channels=vision.num_channels,
            qkv_bias=vision.attention_bias,
            qk_norm=vision.use_qk_norm,
            norm_bias=vision.norm_type == "layer_norm",
            final_norm=not vision.use_mean_pooling,
        )
    if kind in ("qwen2_5_vl", "qwen2_5_vl_vision"):
        return qwen2_5_vit(
            layers=vision.depth,
            width=vision.hidden_size,
            inner=vision.intermediate_size,
            patch=vision.patch_size,
            frames=vision.temporal_patch_size,
            merge=vision.spatial_merge_size,
            window=vision.window_size,
            full_layers=len(vision.fullatt_block_indexes),
            decoder=decoder,
            channels=vision.in_channels,
        )
    raise ValueError(
        "config: expected a vision tower of type clip_vision_model, siglip_vision_model, "
        f"internvl_vision or qwen2_5_vl, got {kind or type(vision).__name__!r}"
    )


def _feature_layers(config: Any) -> int:
    layers = config.vision_feature_layer
    return 1 if isinstance(layers, int) else len(layers)
