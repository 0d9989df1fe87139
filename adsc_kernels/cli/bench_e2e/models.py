"""Decoders with random weights in a known shape, made where they run, and transformers' own."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adsc_kernels.accounting import ModelShape

if TYPE_CHECKING:
    import torch

    from adsc_kernels.llava import Llava


class Models:
    """Ours, and transformers' decoder of the same shape with weights of its own, once it is asked
    for."""

    def __init__(self, ours: Llava, shape: ModelShape) -> None:
        self.ours, self.shape = ours, shape

    @classmethod
    def random(cls, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Models:
        """Without a tower or a processor."""
        return cls(random_model(shape, device, dtype), shape)

    @classmethod
    def from_pretrained(cls, path: str, device: torch.device, dtype: torch.dtype) -> Models:
        """A checkpoint's decoder. Raises as `Llava.from_pretrained`."""
        from adsc_kernels.llava import Llava

        ours = Llava.from_pretrained(path, device=device, dtype=dtype)
        return cls(ours, ModelShape.from_config(ours.config))

    @cached_property
    def theirs(self) -> Any:
        """With flash-attn where it is installed, else SDPA; random weights."""
        import torch
        from transformers import LlamaForCausalLM, Qwen2ForCausalLM
        from transformers.utils import is_flash_attn_2_available

        weight = self.ours.language_model.embed_tokens.weight
        flash = weight.is_cuda and is_flash_attn_2_available()
        kind = Qwen2ForCausalLM if self.shape.qkv_bias else LlamaForCausalLM
        config = kind.config_class(**text_config(self.shape))
        with torch.device(weight.device):
            theirs = kind._from_config(
                config,
                attn_implementation="flash_attention_2" if flash else "sdpa",
                dtype=weight.dtype,
            )
        return theirs.eval()


def text_config(shape: ModelShape) -> dict[str, Any]:
    """As transformers names the sizes."""
    return {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": 2**16,
    }


def random_model(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Llava:
    """The thin model in this shape."""
    import torch
    import transformers

    from adsc_kernels.llava import Llava, LlavaConfig
    from adsc_kernels.llava.model import Layer

    text = transformers.LlamaConfig(**text_config(shape), attention_bias=shape.qkv_bias)
    hf = transformers.LlavaConfig(text_config=text, image_token_index=0)
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        config = LlavaConfig.from_folder(Path(folder))
    model = Llava(config, cast(Any, None)).eval()
    if shape.qkv_bias and not shape.out_bias:  # Llama has both or neither
        for layer in model.language_model.layers:
            cast(Layer, layer).self_attn.o_proj.register_parameter("bias", None)
    rng = torch.Generator(device).manual_seed(0)
    state = {}
    for name, p in model.named_parameters():
        if name.startswith(("language_model.", "lm_head.")):
            weight = torch.empty(p.shape, dtype=dtype, device=device)
            norm = name.endswith("norm.weight")
            state[name] = weight.fill_(1) if norm else weight.normal_(0, 0.02, generator=rng)
    model.load_state_dict(state, strict=False, assign=True)
    model.language_model.to(device)
    return model
