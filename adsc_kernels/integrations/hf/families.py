"""What is particular to a family of models: a small adapter each, and a registry of them.

To add one, say by the `model_type` of its config where its decoder is and what its pictures are
made of, and `register` it. All that is not said here is the same for all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from adsc_kernels.errors import UnsupportedError
from adsc_kernels.integrations.hf.compat import fitting, parameters
from adsc_kernels.integrations.hf.masks import MaskMaker, MaskRequest, causal_masks
from adsc_kernels.integrations.hf.pictures import TEXT, Piece, alike, joined

# From the model without its head, and the arguments of its forward (or of get_image_features), to
# the pieces of the pictures in them.
Pictures = Callable[[Any, Mapping[str, Any]], Iterable[Piece]]
# From the token types of a pass, [B, S], to the blocks that see each other both ways.
Blocks = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    """An adapter.

    Attributes:
        model_type: of the config of the whole model.
        images, videos: what the pictures of a call are made of; None where there are none.
        decoder: the name of the decoder within the model; it has `layers` and `rotary_emb`.
        mrope: positions have three axes: time, height and width.
        masks: makes a stage's masks.
        blocks: which tokens see each other both ways, where `token_type_ids` say so.
        deepstack: features of pictures are added between the first layers, too.
    """

    model_type: str
    images: Pictures
    videos: Pictures | None = None
    decoder: str = "language_model"
    mrope: bool = False
    masks: MaskMaker = causal_masks
    blocks: Blocks | None = None
    deepstack: bool = False

    def tokens(self, config: Any) -> dict[int, int]:
        """Token types to placeholder ids: 1 is an image's, 2 a video's."""
        names = {1: ("image_token_id", "image_token_index")}
        if self.videos is not None:
            names[2] = ("video_token_id", "video_token_index")
        return {
            kind: next(int(getattr(config, name)) for name in some if hasattr(config, name))
            for kind, some in names.items()
        }


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Let `apply_adsc` serve models of that type; a later one takes the place of an earlier one."""
    FAMILIES[family.model_type] = family
    return family


# ---- What pictures are made of ----


def square(count: int) -> Iterable[Piece]:
    """As many pictures as there are, each `count` tokens, a square grid if that is a square."""
    side = round(count**0.5)
    return alike(Piece.grid(side, side) if side * side == count else Piece(count, count))


def llava(base: Any, given: Mapping[str, Any]) -> Iterable[Piece]:
    """LLaVA-1.5: one size; with a Pixtral tower, rows that end in a token."""
    vision = base.config.vision_config
    if vision.model_type == "pixtral":
        return rows_with_breaks(base, given)
    side = vision.image_size // vision.patch_size
    drops_first = base.config.vision_feature_select_strategy == "default"
    return square(side * side + (vision.model_type == "clip_vision_model") - drops_first)


def rows_with_breaks(base: Any, given: Mapping[str, Any]) -> list[Piece]:
    """Pixtral, Mistral 3: any size; behind each row a token of text."""
    config = base.config
    patch = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    sizes = torch.as_tensor(given["image_sizes"]).tolist()
    return [Piece.grid(h // patch, w // patch, 1, written=False) for h, w in sizes]


def tiles_with_newlines(base: Any, given: Mapping[str, Any]) -> list[Piece]:
    """LLaVA-NeXT and OneVision: an overview, then the rows of all tiles, each with a newline.

    The model's own packing is asked where newlines come to lie, with zeros for features.
    """
    config = base.config
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    strategy = given.get("vision_feature_select_strategy")
    strategy = strategy or config.vision_feature_select_strategy
    overview = side * side + (vision.model_type == "clip_vision_model" and strategy == "full")
    values: dict[str, Any] = {"vision_feature_select_strategy": strategy}
    if hasattr(config, "vision_aspect_ratio"):
        values["vision_aspect_ratio"] = given.get("vision_aspect_ratio")
        values["vision_aspect_ratio"] = values["vision_aspect_ratio"] or config.vision_aspect_ratio
    options = {
        name: values[name] for name in parameters(base.pack_image_features) if name in values
    }
    sizes = torch.as_tensor(given["image_sizes"]).cpu()
    found = []
    for size, count in zip(sizes, _tile_counts(base, given, sizes), strict=True):
        features = [torch.zeros(count, overview, 1, device="cpu")]
        newline = torch.ones(1, device="cpu")
        packed, _ = base.pack_image_features(features, size[None], image_newline=newline, **options)
        breaks = packed[0].flatten().nonzero().flatten().tolist()
        found.append(next(iter(square(overview))))
        if count == 1:
            found.append(TEXT)
        else:
            found.append(Piece.grid(len(breaks), breaks[0] - overview, 1))
    return found


def _tile_counts(base: Any, given: Mapping[str, Any], sizes: Tensor) -> list[int]:
    """Tiles of each picture, the overview among them; OneVision has no more for several."""
    numbers = given.get("batch_num_images")
    numbers = [1] * len(sizes) if numbers is None else torch.as_tensor(numbers).tolist()
    alone = [n == 1 for n in numbers for _ in range(n)]
    count = sys.modules[type(base).__module__].image_size_to_num_patches
    config = base.config
    return [
        count(size, config.image_grid_pinpoints, config.vision_config.image_size) if tiled else 1
        for size, tiled in zip(sizes, alone, strict=True)
    ]


def pooled_frames(base: Any, given: Mapping[str, Any]) -> list[Piece]:
    """OneVision's videos: frames of half the side, and one newline behind all."""
    vision = base.config.vision_config
    side = -(-(vision.image_size // vision.patch_size) // 2)
    videos, frames = given["pixel_values_videos"].shape[:2]
    return ([Piece.grid(side, side)] * frames + [TEXT]) * videos


def qwen_images(base: Any, given: Mapping[str, Any]) -> list[Piece]:
    """Qwen-VL: any size, told in patches before they are merged."""
    return _qwen(base, given["image_grid_thw"])


def qwen_videos(base: Any, given: Mapping[str, Any]) -> list[Piece]:
    """Qwen-VL's videos: a picture for each frame, with or without text between them."""
    return _qwen(base, given["video_grid_thw"])


def _qwen(base: Any, grids: Any) -> list[Piece]:
    merge = base.config.vision_config.spatial_merge_size
    return joined(
        [Piece.grid(h // merge, w // merge)] * t for t, h, w in torch.as_tensor(grids).tolist()
    )


def internvl(base: Any, given: Mapping[str, Any]) -> Iterable[Piece]:
    """InternVL: tiles of one size, one behind the other."""
    return square(base.config.image_seq_length)


def idefics(base: Any, given: Mapping[str, Any]) -> Iterable[Piece]:
    """Idefics 3, SmolVLM: tiles of one size, with text between them."""
    return square(base.image_seq_len)


def gemma3(base: Any, given: Mapping[str, Any]) -> Iterable[Piece]:
    """Gemma 3: one size."""
    return square(base.config.mm_tokens_per_image)


def paligemma(base: Any, given: Mapping[str, Any]) -> Iterable[Piece]:
    """PaliGemma: one size."""
    vision = base.config.vision_config
    return square((vision.image_size // vision.patch_size) ** 2)


# ---- Who sees whom both ways ----


def each_picture(types: Tensor) -> Tensor:
    """Gemma 3: the tokens of a picture."""
    picture = types == 1
    begins = picture & ~nn.functional.pad(picture, (1, 0))[:, :-1]
    return torch.where(picture, begins.int().cumsum(1) - 1, -1)


def prefix(types: Tensor) -> Tensor:
    """PaliGemma: all that is not to be learnt."""
    return torch.where(types == 0, 0, -1)


def gemma3_masks(request: MaskRequest) -> Any:
    """Causal or within a picture; where layers slide, within the window besides."""
    if request.block_ids is None:
        return causal_masks(request)
    try:
        from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model
    except ImportError as error:
        got = transformers.__version__
        expected = "expected a transformers that has create_masks_for_vision_model"
        raise UnsupportedError(f"gemma3: {expected}, got {got}") from error
    arguments = fitting(
        create_masks_for_vision_model,
        config=request.config,
        inputs_embeds=request.rows,
        attention_mask=request.real,
        cache=request.cache,
        position_ids=None,
        block_sequence_ids=request.block_ids,
    )
    return create_masks_for_vision_model(**arguments)


# ---- The families ----

register(Family("llava", llava))
register(Family("mistral3", rows_with_breaks))
register(Family("llava_next", tiles_with_newlines))
register(Family("llava_onevision", tiles_with_newlines, pooled_frames))
for _model_type in ("qwen2_vl", "qwen2_5_vl"):
    register(Family(_model_type, qwen_images, qwen_videos, mrope=True))
register(Family("qwen3_vl", qwen_images, qwen_videos, mrope=True, deepstack=True))
register(Family("internvl", internvl))
for _model_type in ("idefics3", "smolvlm"):
    register(Family(_model_type, idefics, decoder="text_model"))
register(Family("gemma3", gemma3, masks=gemma3_masks, blocks=each_picture))
register(Family("paligemma", paligemma, blocks=prefix))
