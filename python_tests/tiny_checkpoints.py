"""Random LLaVA-1.5 checkpoints in Hugging Face format, small enough to run hundreds of times."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{n}" for n in range(40)]
SPECIAL = ["<unk>", "<s>", "</s>", "<image>"]
VOCAB = {word: n for n, word in enumerate([*SPECIAL, *WORDS])}
IMAGE_ID = VOCAB["<image>"]
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 4,
    head_dim: int | None = None,
    grid: int = 4,
    rope: dict[str, Any] | None = None,
    tied: bool = False,
    attention_bias: bool = False,
    feature_layer: int | list[int] = -2,
    select: str = "default",
    names: str = "4",
    shard: str = "5GB",
    max_positions: int = 512,
    eos: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> LlavaForConditionalGeneration:
    """Write one and return the transformers model it was written from, in eval mode.

    names: of the weights, as transformers "4", "4-nested" (a CLIP tower inside a vision_model, as
    the published checkpoints have it) or "5" writes them.
    """
    text: dict[str, Any] = {
        "vocab_size": len(VOCAB) + 4,  # padded, as the published ones are
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_positions,
        "attention_bias": attention_bias,
        "tie_word_embeddings": tied,
        "bos_token_id": VOCAB["<s>"],
        "eos_token_id": eos,
    }
    if head_dim is not None:
        text["head_dim"] = head_dim
    if rope is not None:
        text["rope_parameters"] = rope
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=4 * grid,
        patch_size=4,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text),
        image_token_index=IMAGE_ID,
        image_seq_length=grid * grid,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=select,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        # transformers' 0.02 would make all logits nearly the same, and every test nearly blind.
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(std=0.6 if "embed_tokens" in name else 0.25)
            elif "norm" in name:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(std=0.1)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard, save_original_format=names != "5")
    if names == "4-nested":
        _nest_tower(folder)
    save_processor(folder, grid)
    return model


def _nest_tower(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    nest = re.compile(r"^vision_tower\.(vision_model\.)?")  # some versions write it nested
    weights = load_file(file)
    renamed = {nest.sub("vision_tower.vision_model.", name): weights[name] for name in weights}
    save_file(renamed, file, metadata={"format": "pt"})


def save_processor(folder: Path, grid: int) -> None:
    """A word-level tokenizer and a CLIP image processor."""
    inner = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", VOCAB["<s>"])]
    )
    inner.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    size = 4 * grid
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def picture(seed: int, size: tuple[int, int] = (20, 24)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
