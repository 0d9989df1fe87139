"""Checkpoints that vLLM's own LLaVA can read, for comparing with it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MODEL = Path(__file__).parents[2] / "adsc_kernels" / "checkpoints" / "tiny-llava-digits"


def as_vllm_reads(source: Path, folder: Path) -> Path:
    """A copy with the names that vLLM's own LLaVA knows: transformers 5 writes the CLIP tower
    without its "vision_model"."""
    target = folder / source.name
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    flat = re.compile(r"^vision_tower\.(?!vision_model\.)")
    renamed = {flat.sub("vision_tower.vision_model.", name): weights[name] for name in weights}
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})
    return target


def wide(folder: Path, hidden: int) -> Path:
    """Random float32 weights: the bundled model's tower, 576 tokens a picture and 16 layers, but a
    decoder of this width, with heads of 64 and an MLP of 11/4 of it."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    target = folder / f"wide-{hidden}"
    shutil.copytree(MODEL, target, ignore=shutil.ignore_patterns("*.safetensors", "pictures"))
    settings = json.loads((MODEL / "config.json").read_text())
    settings["dtype"] = "float32"
    settings["text_config"] |= {
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "head_dim": 64,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
    }
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(**settings))
    model.save_pretrained(target)
    return as_vllm_reads(target, folder / "renamed")


def like_7b(folder: Path) -> Path:
    """LLaVA-1.5-7B's shape: a CLIP-L tower and a Llama-7B decoder."""
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    return _without_weights(folder / "like-7b", 4096, 11008, 128, tower | {"num_hidden_layers": 24})


def narrow(folder: Path) -> Path:
    """LLaVA-1.5-7B's 32 layers, so narrow that a step's time is the host's; the bundled tower."""
    return _without_weights(folder / "narrow", 32, 32, 32, {})


def _without_weights(target: Path, hidden: int, mlp: int, head: int, tower: dict) -> Path:
    """A decoder of 32 layers for vLLM's load format "dummy": the bundled model's tokenizer and 576
    tokens a picture of 48 x 48 pixels."""
    shutil.copytree(MODEL, target, ignore=shutil.ignore_patterns("*.safetensors", "pictures"))
    settings = json.loads((MODEL / "config.json").read_text())
    settings["dtype"] = "bfloat16"
    settings["text_config"] |= {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "head_dim": head,
        "num_attention_heads": hidden // head,
        "num_key_value_heads": hidden // head,
        "num_hidden_layers": 32,
        "max_position_embeddings": 4096,
    }
    settings["vision_config"] |= tower
    (target / "config.json").write_text(json.dumps(settings))
    return target
