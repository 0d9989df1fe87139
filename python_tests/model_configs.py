"""Small transformers configs of every kind of model that the accounting knows, and real ones."""

from __future__ import annotations

import transformers as hf

TEXT = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=70,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VIT = dict(
    hidden_size=32,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=48,
    patch_size=8,
)
IMAGE = 69  # the image token's id


def small() -> dict[str, hf.PretrainedConfig]:
    llama = hf.LlamaConfig(**TEXT)
    clip = hf.CLIPVisionConfig(**VIT)
    qwen2 = hf.Qwen2Config(**TEXT)
    llava = dict(vision_config=clip, text_config=llama, image_token_index=IMAGE)
    return {
        "llava": hf.LlavaConfig(**llava, vision_feature_layer=-2),
        "llava-two-features": hf.LlavaConfig(
            **llava,
            vision_feature_layer=[-2, 1],
            vision_feature_select_strategy="full",
            multimodal_projector_bias=False,
            tie_word_embeddings=True,
        ),
        "llava-next": hf.LlavaNextConfig(**llava),
        "onevision": hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(**VIT, vision_use_head=False),
            text_config=qwen2,
            image_token_index=IMAGE,
        ),
        "internvl": hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(
                **{**VIT, "image_size": [48, 48], "patch_size": [8, 8]}, attention_bias=True
            ),
            text_config=qwen2,
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        ),
        "internvl-other-vit": hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(
                **{**VIT, "image_size": [48, 48], "patch_size": [8, 8]},
                use_qk_norm=True,
                norm_type="rms_norm",
                use_mean_pooling=False,
            ),
            text_config=hf.Qwen3Config(**TEXT, head_dim=16),
            image_token_id=IMAGE,
        ),
        "qwen2.5-vl": hf.Qwen2_5_VLConfig(
            text_config={
                **TEXT,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
            },
            vision_config=dict(
                depth=3,
                hidden_size=32,
                intermediate_size=36,
                num_heads=4,
                patch_size=8,
                spatial_merge_size=2,
                window_size=64,
                out_hidden_size=48,
                fullatt_block_indexes=[1],
            ),
            image_token_id=IMAGE,
        ),
        "llama": hf.LlamaConfig(**TEXT, attention_bias=True, mlp_bias=True),
        "mistral": hf.MistralConfig(**TEXT, sliding_window=None),
        "qwen2": hf.Qwen2Config(**TEXT, tie_word_embeddings=True),
        "qwen3": hf.Qwen3Config(**TEXT, head_dim=16),
    }


def model_of(config: hf.PretrainedConfig):
    """A model of random weights with eager attention: the profiler has no rule for CPU's fused."""
    if hasattr(config, "vision_config"):
        return hf.AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def published(name: str) -> hf.PretrainedConfig:
    """The config of a published checkpoint, as far as sizes go."""
    family, _, size = name.rpartition("-")
    vicuna_7b = hf.LlamaConfig(vocab_size=32064)
    vicuna_13b = hf.LlamaConfig(
        vocab_size=32064,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    )
    qwen_7b = dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    )
    if family == "qwen2.5-vl":
        text = {"7b": {**qwen_7b, "vocab_size": 152064}, "3b": QWEN_VL_3B}[size]
        vision = dict(hidden_size=1280, out_hidden_size=text["hidden_size"])
        return hf.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=size == "3b"
        )
    if family == "internvl3":
        text = {"8b": qwen_7b, "14b": QWEN_14B}[size]
        return hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(attention_bias=True),
            text_config=hf.Qwen2Config(**text, vocab_size=151674),
            tie_word_embeddings=False,
        )
    if family == "llava-onevision":
        return hf.LlavaOnevisionConfig(text_config=hf.Qwen2Config(**qwen_7b, vocab_size=152128))
    if name == "llava-next-mistral-7b":
        mistral = hf.MistralConfig(vocab_size=32064, sliding_window=None)
        return hf.LlavaNextConfig(text_config=mistral)
    kind = hf.LlavaConfig if family == "llava-1.5" else hf.LlavaNextConfig
    return kind(text_config={"7b": vicuna_7b, "13b": vicuna_13b}[size])


QWEN_VL_3B = dict(
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    vocab_size=151936,
)
QWEN_14B = dict(
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=48,
    num_attention_heads=40,
    num_key_value_heads=8,
)
