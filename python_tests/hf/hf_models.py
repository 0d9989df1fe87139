"""Tiny random models of every family, rows for them, and where pictures lie, by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

LAYERS = 4
IMAGE, VIDEO, BREAK, END, PAD = 3, 4, 5, 6, 0
TEXT: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=60,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
)
VIT: dict[str, Any] = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=20,
    patch_size=4,
)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}

Grid = list[list[int]]  # rows of token indices


@dataclass
class Row:
    """One sequence: its tokens, its pictures as the model takes them, and where they lie."""

    ids: list[int] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    types: list[int] = field(default_factory=list)

    def text(self, *ids: int) -> Row:
        self.ids += ids
        self.types += [0] * len(ids)
        return self

    def grid(
        self, height: int, width: int, token: int = IMAGE, between: tuple[int, ...] = ()
    ) -> Row:
        """A picture's tokens, row by row; `between` is what stands behind each row."""
        rows = []
        for _ in range(height):
            rows.append(list(range(len(self.ids), len(self.ids) + width)))
            self.ids += [token] * width
            self.types += [1 if token == IMAGE else 2] * width
            self.ids += between
            self.types += [1 if n == token else 0 for n in between]
        self.grids.append(rows)
        return self

    def give(self, **inputs: Tensor) -> Row:
        for name, value in inputs.items():
            self.inputs.setdefault(name, []).append(value)
        return self


@dataclass
class Case:
    """A family: how its model is made, its rows, and how inputs of several rows are joined."""

    config: Callable[[], Any]
    rows: Callable[[], list[Row]]
    types: str | None = None  # the name of the argument that tells token types
    blocks: Callable[[Row], list[int] | None] = lambda row: None  # who sees whom both ways
    refused: bool = False
    join: Callable[[list[list[Tensor]]], Tensor] = lambda rows: torch.cat(
        [value for row in rows for value in row]
    )

    def model(self, attention: str = "sdpa", seed: int = 0) -> Any:
        config = self.config()
        torch.manual_seed(seed)
        model = hf.AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
        with torch.no_grad():  # the usual 0.02 would make logits nearly alike, and tests blind
            for name, weight in model.named_parameters():
                if weight.dim() >= 2:
                    weight.normal_(std=0.6 if "embed_tokens" in name else 0.25)
                elif "norm" in name:
                    weight.uniform_(0.5, 1.5)
                else:
                    weight.normal_(std=0.1)
        return model.eval()

    def inputs(self, rows: list[Row], side: str = "left") -> dict[str, Tensor]:
        """A padded batch; without a mask where nothing is padded."""
        width = max(len(row.ids) for row in rows)

        def pad(values: list[int], with_: int) -> list[int]:
            rest = [with_] * (width - len(values))
            return rest + values if side == "left" else values + rest

        found: dict[str, Any] = {"input_ids": torch.tensor([pad(row.ids, PAD) for row in rows])}
        if len({len(row.ids) for row in rows}) > 1:
            found["attention_mask"] = torch.tensor([pad([1] * len(r.ids), 0) for r in rows])
        if self.types is not None:
            found[self.types] = torch.tensor([pad(row.types, 0) for row in rows])
        for name in dict.fromkeys(name for row in rows for name in row.inputs):
            found[name] = self.join([row.inputs.get(name, []) for row in rows])
        return found


def noise(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cpu").to(torch.get_default_device())


# ---- One size of picture ----


def _each_picture(row: Row) -> list[int]:
    numbers = {token: n for n, grid in enumerate(row.grids) for line in grid for token in line}
    return [numbers.get(token, -1) for token in range(len(row.ids))]


def _prefix(row: Row) -> list[int]:
    return [-1 if kind else 0 for kind in row.types]


def _with_suffix() -> list[Row]:
    """PaliGemma's token types: all but the last token are a prefix."""
    rows = _fixed(5, _pictures(20))()
    for row in rows:
        row.types = [0] * (len(row.ids) - 1) + [1]
    return rows


def _fixed(side: int, image: Callable[[int], Tensor]) -> Callable[[], list[Row]]:
    def rows() -> list[Row]:
        one = Row().text(1, 11, 12).grid(side, side).text(13, 14).grid(side, side).text(15)
        one.give(pixel_values=image(1)).give(pixel_values=image(2))
        two = Row().text(1).grid(side, side).text(16, 17).give(pixel_values=image(3))
        return [one, two, Row().text(1, 18, 19, 20, 21)]

    return rows


def _pictures(side: int) -> Callable[[int], Tensor]:
    return lambda seed: noise(seed, 1, 3, side, side)


def _llava() -> Any:
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VIT, projection_dim=16),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=25,
    )


def _internvl() -> Any:
    vision = {**VIT, "image_size": [24, 24], "patch_size": [4, 4]}
    return hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**vision),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=9,
    )


def _idefics(config: Any, vision: Any, **more: Any) -> Callable[[], Any]:
    # Up to transformers 5.20 SmolVLM wants the tokens of a tile, 9, to be a multiple of patch_size.
    return lambda: config(
        vision_config=vision(**{**VIT, "image_size": 18, "patch_size": 3}).to_dict(),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        **more,
    )


def _idefics_rows() -> list[Row]:
    """Tiles with text between them, as a picture that is split has; [1, tiles, 3, 18, 18]."""
    one = Row().text(1, 11).grid(3, 3).text(12).grid(3, 3).text(13).grid(3, 3).text(14, 15)
    one.give(pixel_values=noise(1, 1, 3, 3, 18, 18))
    two = Row().text(1, 16, 17).grid(3, 3).text(18).give(pixel_values=noise(2, 1, 1, 3, 18, 18))
    return [one, two]


def _idefics_join(rows: list[list[Tensor]]) -> Tensor:
    most = max(value.shape[1] for row in rows for value in row)
    pad = torch.nn.functional.pad
    return torch.cat(
        [pad(v, (0, 0, 0, 0, 0, 0, 0, most - v.shape[1])) for row in rows for v in row]
    )


def _gemma3() -> Any:
    text = hf.Gemma3TextConfig(
        **TEXT,
        head_dim=8,
        sliding_window=14,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**{**VIT, "image_size": 24}, vision_use_head=False),
        text_config=text,
        mm_tokens_per_image=9,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
    )


def _paligemma() -> Any:
    return hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VIT, vision_use_head=False, projection_dim=32),
        text_config=hf.GemmaConfig(**TEXT, head_dim=8),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )


# ---- Any size ----


def _next() -> Any:
    return hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VIT, projection_dim=16),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[20, 40], [40, 20], [40, 40]],
    )


def _next_rows() -> list[Row]:
    """A 40 x 24 picture fills 2 x 2 tiles of 5 x 5; of their 10 columns 6 are not padding. A
    16 x 40 one takes 1 x 2 tiles, and half a row of padding at either side stays."""
    one = Row().text(1, 11).grid(5, 5).grid(10, 6, between=(IMAGE,)).text(12, 13)
    one.give(pixel_values=noise(1, 1, 5, 3, 20, 20), image_sizes=torch.tensor([[40, 24]]))
    two = Row().text(1).grid(5, 5).grid(5, 10, between=(IMAGE,)).text(14, 15, 16)
    two.give(pixel_values=noise(2, 1, 5, 3, 20, 20), image_sizes=torch.tensor([[16, 40]]))
    return [one, two]


def _onevision(aspect: str) -> Callable[[], Any]:
    return lambda: hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VIT, vision_use_head=False),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[20, 40], [40, 20], [40, 40]],
        vision_aspect_ratio=aspect,
        vision_feature_select_strategy="full",
    )


def _onevision_rows(height: int, width: int) -> Callable[[], list[Row]]:
    def rows() -> list[Row]:
        one = Row().text(1, 11).grid(5, 5).grid(height, width, between=(IMAGE,)).text(12, 13)
        one.give(pixel_values=noise(1, 1, 5, 3, 20, 20), image_sizes=torch.tensor([[40, 24]]))
        # A video: 2 frames of 3 x 3 and one newline, which stays.
        two = Row().text(1).grid(3, 3, VIDEO).grid(3, 3, VIDEO).text(VIDEO, 14, 15)
        two.give(pixel_values_videos=noise(2, 1, 2, 3, 20, 20))
        return [one, two]

    return rows


def _qwen(config: Any, vision: dict[str, Any]) -> Callable[[], Any]:
    return lambda: config(
        text_config={**TEXT, "rope_parameters": MROPE, "head_dim": 8},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=7,
        vision_end_token_id=8,
        tie_word_embeddings=False,
    )


def _qwen_rows(between_frames: tuple[int, ...]) -> Callable[[], list[Row]]:
    def rows() -> list[Row]:
        size = 3 * 2 * 4 * 4
        one = Row().text(1, 11, 7).grid(3, 4).text(8, 12, 7).grid(2, 3).text(8, 13)
        one.give(pixel_values=noise(1, 48, size), image_grid_thw=torch.tensor([[1, 6, 8]]))
        one.give(pixel_values=noise(2, 24, size), image_grid_thw=torch.tensor([[1, 4, 6]]))
        two = Row().text(1, 7).grid(3, 3, VIDEO).text(*between_frames).grid(3, 3, VIDEO).text(8, 14)
        two.give(pixel_values_videos=noise(3, 72, size), video_grid_thw=torch.tensor([[2, 6, 6]]))
        return [one, two]

    return rows


QWEN2_VISION = dict(depth=2, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4)
QWEN25_VISION = dict(
    depth=2,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    patch_size=4,
    window_size=16,
    fullatt_block_indexes=[1],
    out_hidden_size=32,
)
QWEN3_VISION = dict(
    depth=3,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    patch_size=4,
    out_hidden_size=32,
    num_position_embeddings=64,
    deepstack_visual_indexes=[0, 2],
)


def _pixtral_vision() -> Any:
    return hf.PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=40,
        patch_size=4,
        head_dim=8,
    )


def _mistral3() -> Any:
    return hf.Mistral3Config(
        vision_config=_pixtral_vision(),
        text_config=hf.MistralConfig(**TEXT, head_dim=8, sliding_window=None),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )


def _pixtral() -> Any:
    return hf.LlavaConfig(
        vision_config=_pixtral_vision(),
        text_config=hf.MistralConfig(**TEXT, head_dim=8, sliding_window=None),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _broken_rows(patch: int) -> Callable[[], list[Row]]:
    """Rows that end in a break, the last one in another token."""

    def rows() -> list[Row]:
        found = []
        for seed, (height, width) in ((1, (3, 5)), (2, (4, 2))):
            row = Row().text(1, 11).grid(height, width, between=(BREAK,)).text(12, 13, seed + 20)
            row.ids[-4] = END
            size = torch.tensor([[height * patch, width * patch]])
            image = torch.zeros(1, 3, 40, 40)
            image[..., : height * patch, : width * patch] = noise(
                seed, 3, height * patch, width * patch
            )
            found.append(row.give(pixel_values=image, image_sizes=size))
        return found

    return rows


SMALL = _pictures(24)
# transformers 5.0 makes no masks by blocks, and its Qwens' `generate` takes no token types.
BLOCKS = "block_sequence_ids" in inspect.signature(create_masks_for_generate).parameters
TYPES = "mm_token_type_ids" if BLOCKS else None
CASES: dict[str, Case] = {
    "llava": Case(_llava, _fixed(5, _pictures(20))),
    "llava-pixtral": Case(_pixtral, _broken_rows(4)),
    "llava_next": Case(_next, _next_rows),
    "llava_onevision": Case(_onevision("anyres_max_9"), _onevision_rows(10, 6)),
    "llava_onevision-1": Case(_onevision("anyres_max_1"), _onevision_rows(6, 3)),
    "qwen2_vl": Case(_qwen(hf.Qwen2VLConfig, QWEN2_VISION), _qwen_rows(()), TYPES),
    "qwen2_5_vl": Case(_qwen(hf.Qwen2_5_VLConfig, QWEN25_VISION), _qwen_rows(()), TYPES),
    "qwen3_vl": Case(_qwen(hf.Qwen3VLConfig, QWEN3_VISION), _qwen_rows((8, 30, 7)), TYPES),
    "internvl": Case(_internvl, _fixed(3, SMALL)),
    "idefics3": Case(
        _idefics(hf.Idefics3Config, hf.Idefics3VisionConfig), _idefics_rows, join=_idefics_join
    ),
    "smolvlm": Case(
        _idefics(hf.SmolVLMConfig, hf.SmolVLMVisionConfig), _idefics_rows, join=_idefics_join
    ),
    "gemma3": Case(_gemma3, _fixed(3, SMALL), "token_type_ids", _each_picture, refused=not BLOCKS),
    "mistral3": Case(_mistral3, _broken_rows(8)),
    "paligemma": Case(_paligemma, _with_suffix, "token_type_ids", _prefix, refused=not BLOCKS),
}
