"""The decoder: a packed, variable-length Llama that drops vision tokens at stage boundaries.

The rows of all sequences lie one after the other, [T, hidden], without padding. What a stage needs
to know of them (cu_seqlens, positions, cache lengths, who survives) is in `plan.stages[s]`, made on
the host before the first layer runs. `Decoder.forward` is what to copy into another engine.
"""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .. import ops
from ..attention import varlen_attention
from ..cache import KVCache, StageCache
from ..errors import UnsupportedError
from ..plan import CompressionPlan, StagePlan
from .config import LlavaConfig

Rope = tuple[Tensor, Tensor]


class Phase(Enum):
    """What a pass is for. The caller says it: no length gives it away, a prompt can be one token."""

    PREFILL = "prefill"  # whole prompts, nothing cached: the keys are the chunk's own rows
    CHUNKED_PREFILL = "chunked prefill"  # a part of each prompt, behind the parts before it
    LATER_TURN = "later turn"  # new text and pictures, behind a conversation that is cached
    DECODE = "decode"  # the token generated last, of every sequence still going


class RMSNorm(nn.Module):
    """Adds to the residual stream and norms the sum."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.eps = config.hf.text_config.rms_norm_eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm(residual + x), residual + x); without a residual x begins the stream."""
        residual = x if residual is None else residual + x
        return F.rms_norm(residual, self.weight.shape, self.weight, self.eps), residual


class Attention(nn.Module):
    """Self-attention of one layer, grouped key heads or not."""

    def __init__(self, config: LlavaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        bias = config.hf.text_config.attention_bias
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=bias)
        self.o_proj = nn.Linear(q, config.hidden_size, bias=bias)

    def forward(
        self, x: Tensor, rope: Rope, stage: StagePlan, cache: StageCache | None, phase: Phase
    ) -> Tensor:
        """Rows [T, hidden] of a stage to as many, writing their K and V to the stage's cache."""
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), rope)
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), rope)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        keys = None
        if cache is not None:
            cached_k, cached_v = cache.append(self.layer, k, v)
            if phase is not Phase.PREFILL:  # there is more to attend to than these rows
                k, v, keys = cached_k, cached_v, cache.keys
        return self.o_proj(varlen_attention(q, k, v, stage, keys=keys).flatten(-2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        bias = config.hf.text_config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Rows [T, hidden] to as many."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A layer's parts; the decoder runs them, since a boundary cuts through the first norm."""

    def __init__(self, config: LlavaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)


class Decoder(nn.Module):
    """Token embedding, layers and final norm."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        with torch.device("meta"):  # the weights are still to come
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_layers))
            self.norm = RMSNorm(config)
        # transformers computes the frequencies, so that every scaling variant is read as it does.
        text = config.hf.text_config
        rotary = LlamaRotaryEmbedding(text)
        if rotary.inv_freq.numel() * 2 != config.head_dim:
            raise UnsupportedError(f"RoPE on a part of each head: {text.rope_parameters}")
        self.rope_scale = float(rotary.attention_scaling)
        self.register_buffer("inv_freq", rotary.inv_freq, persistent=False)

    def forward(
        self, x: Tensor, plan: CompressionPlan, cache: KVCache | None, phase: Phase
    ) -> Tensor:
        """Rows of stage 0, [T, hidden], to rows of the last stage, before the final norm."""
        residual: Tensor | None = None
        for s, stage in enumerate(plan.stages):
            # What depends on the layout is made once here, and shared by the stage's layers.
            rope = self.rope_table(stage.positions, x.dtype)
            stage_cache = None if cache is None else cache.stages[s]
            if stage_cache is not None:
                stage_cache.begin(stage)
            layers = plan.schedule.layers_of_stage(s)
            for n in layers:
                layer = self.layers[n]
                norm = layer.input_layernorm
                if n > layers.start or stage.is_identity:
                    x, residual = norm(x, residual)
                elif residual is None:  # a boundary before layer 0: nothing is there to be added
                    x, residual = norm(ops.downsample(x, stage))
                else:
                    # The boundary. x is the output of the MLP before, still to be added: the sum
                    # and its norm are made of survivors only, and dropped rows are never touched.
                    x, residual = ops.downsample_add_rms_norm(
                        x, residual, norm.weight, stage, eps=norm.eps
                    )
                x = layer.self_attn(x, rope, stage, stage_cache, phase)
                x, residual = layer.post_attention_layernorm(x, residual)
                x = layer.mlp(x)
        return x if residual is None else residual + x

    def rope_table(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        """cos and sin, [T, 1, head_dim], of rows at these positions."""
        angles = positions[:, None, None].to(torch.float32) * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.rope_scale).to(dtype), (angles.sin() * self.rope_scale).to(
            dtype
        )


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate [T, H, D] by the table of its rows."""
    cos, sin = rope
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin
