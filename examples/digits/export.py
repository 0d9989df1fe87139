"""Write the trained parts as a Hugging Face LLaVA checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from model import Reader, Sizes, Tower

MAX_POSITIONS = 4096


def config(sizes: Sizes, layers: int, tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """The configuration of the whole model."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=sizes.tower_width,
        intermediate_size=sizes.tower_mlp,
        num_hidden_layers=sizes.tower_layers,
        num_attention_heads=sizes.tower_heads,
        image_size=sizes.image,
        patch_size=sizes.patch,
        hidden_act="gelu",
        layer_norm_eps=sizes.eps,
        projection_dim=sizes.tower_width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp,
        num_hidden_layers=layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.width // sizes.heads,
        rms_norm_eps=sizes.eps,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        tie_word_embeddings=False,
        **special,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(sizes.image // sizes.patch) ** 2,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=False,
        **special,
    )


def _fill(target: nn.Module, source: dict[str, torch.Tensor], prefix: str = "") -> None:
    target.load_state_dict({prefix + k: v for k, v in source.items()})


def assemble(
    tower: Tower, reader: Reader, tokenizer: PreTrainedTokenizerFast
) -> LlavaForConditionalGeneration:
    """Put the trained weights into transformers' model."""
    hf = LlavaForConditionalGeneration(config(reader.sizes, len(reader.layers), tokenizer))
    vision = hf.model.vision_tower
    _fill(vision, tower.state_dict(), "vision_model." if hasattr(vision, "vision_model") else "")
    state = reader.state_dict()
    _fill(
        hf.model.multi_modal_projector,
        {k.removeprefix("projector."): v for k, v in state.items() if k.startswith("projector.")},
    )
    _fill(hf.lm_head, {"weight": state["lm_head.weight"]})
    llama = {k: v for k, v in state.items() if not k.startswith(("projector.", "lm_head."))}
    _fill(hf.model.language_model, llama)
    return hf.eval()


def processor(sizes: Sizes, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Images to 48 x 48 and -1..1; one ``<image>`` to its 576 places."""
    images = CLIPImageProcessor(
        size={"shortest_edge": sizes.image},
        crop_size={"height": sizes.image, "width": sizes.image},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=sizes.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=tokenizer.chat_template,
    )


def export(tower: Tower, reader: Reader, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model (float16), tokenizer and processor into ``out``."""
    hf = assemble(tower, reader, tokenizer).half()
    hf.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=16,
    )
    hf.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    processor(reader.sizes, tokenizer).save_pretrained(out)
