"""The thin LLaVA: a packed, variable-length Llama that drops vision tokens at stage boundaries.

The rows of all sequences lie one after the other, [T, hidden], without padding. What a stage needs
to know of them (cu_seqlens, positions, cache lengths, who survives) is in `plan.stages[s]`, made on
the host before the first layer runs. `Decoder.forward` is what to copy into another engine.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from adsc_kernels import adapters, checks, ops
from adsc_kernels.attention import varlen_attention
from adsc_kernels.cache import KVCache, Phase, StageCache
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.hub import find_folder
from adsc_kernels.llava.config import LlavaConfig
from adsc_kernels.llava.generate import generate
from adsc_kernels.llava.processor import Processor
from adsc_kernels.llava.weights import DTYPES as WEIGHT_DTYPES
from adsc_kernels.llava.weights import load_weights
from adsc_kernels.plan import CompressionPlan, StagePlan
from adsc_kernels.schedule import CompressionSchedule

Rope = tuple[Tensor, Tensor]  # cos and sin, [T, 1, head_dim]: of each row's position


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

    def forward(self, x: Tensor, rope: Rope, stage: StagePlan, cache: StageCache | None) -> Tensor:
        """Rows [T, hidden] of a stage to as many, their K and V written to the stage's cache."""
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), rope)
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), rope)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        keys = None
        if cache is not None:
            k, v, keys = cache.append(self.layer, k, v)
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

    inv_freq: Tensor

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
            angles = (stage.positions[:, None, None].float() * self.inv_freq).repeat(1, 1, 2)
            cos, sin = angles.cos() * self.rope_scale, angles.sin() * self.rope_scale
            rope = (cos.to(x.dtype), sin.to(x.dtype))
            stage_cache = None if cache is None else cache.stages[s].begin(stage, phase)
            layers = plan.schedule.layers_of_stage(s)
            for n in layers:
                layer = cast(Layer, self.layers[n])
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
                x = layer.self_attn(x, rope, stage, stage_cache)
                x, residual = layer.post_attention_layernorm(x, residual)
                x = layer.mlp(x)
        return x if residual is None else residual + x


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate [T, H, D] by the table of its rows."""
    cos, sin = rope
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Llava(nn.Module):
    """A LLaVA-1.5 with its processor and a compression schedule, made by `from_pretrained`."""

    def __init__(self, config: LlavaConfig, processor: Processor) -> None:
        super().__init__()
        self.config, self.processor = config, processor
        self.schedule = CompressionSchedule.dense(config.num_layers)
        self.language_model = Decoder(config)
        hf, size = config.hf, config.hidden_size
        width = hf.vision_config.hidden_size * len(config.feature_layers)
        bias = hf.multimodal_projector_bias
        with torch.device("meta"):  # the weights are still to come
            self.vision_tower = CLIPVisionModel(hf.vision_config)
            first, second = nn.Linear(width, size, bias), nn.Linear(size, size, bias)
            self.multi_modal_projector = nn.ModuleDict({"linear_1": first, "linear_2": second})
            if not hf.tie_word_embeddings:
                self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        for module in self.vision_tower.modules():  # the one table that the tower makes itself
            if "position_ids" in module._buffers:
                module.position_ids = torch.arange(config.grid**2 + 1)[None]

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        schedule: CompressionSchedule | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        adapter: str | Path | None = None,
    ) -> Llava:
        """Read a checkpoint in Hugging Face format: a local folder, or an id on the hub.

        schedule: an object, or text such as "8:1/4,16:1/4"; None drops nothing.
        device: None means CUDA where there is one. dtype: None means the checkpoint's.
        adapter: the folder of one that `adsc train` made, merged into the weights; the schedule is
          then its own, and a given one has to be the same (`with_schedule` takes any).

        Raises FileNotFoundError, ValueError (damaged files, or a device that can't be used),
        TypeError or UnsupportedError (no LLaVA-1.5, or weights that would hold no values).
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        target = checks.usable_device("device", device)
        if target.type == "meta":
            raise UnsupportedError("device: expected one that holds weights, got 'meta'")
        if dtype is not None:
            checks.dtype("dtype", dtype, WEIGHT_DTYPES)
        folder = find_folder(path_or_id)
        config = LlavaConfig.from_folder(folder)
        tuned = None if adapter is None else checks.path("adapter", adapter)
        if tuned is not None:
            schedule = adapters.agree(tuned, schedule, config.num_layers)
        model = cls(config, Processor(folder, config)).eval().with_schedule(schedule)
        load_weights(model, folder, target, dtype, tuned)
        return model.to(target)

    def with_schedule(self, schedule: CompressionSchedule | str | None) -> Llava:
        """The same model, on the same weights, under another schedule."""
        depth = self.config.num_layers
        if not isinstance(schedule, CompressionSchedule):
            text = "" if schedule is None else schedule
            schedule = CompressionSchedule.parse(text, num_layers=depth)
        if schedule.num_layers != depth:
            raise ValueError(f"schedule: expected one of {depth} layers, got {schedule.num_layers}")
        twin = copy.copy(self)  # shares the modules
        twin.schedule = schedule
        return twin

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.language_model.embed_tokens.weight.device

    def new_cache(self, num_sequences: int) -> KVCache:
        """An empty cache for a batch under this model's schedule."""
        checks.integer("num_sequences", num_sequences, 0)
        like = self.language_model.embed_tokens.weight
        shape = (self.config.num_kv_heads, self.config.head_dim)
        return KVCache(self.schedule, num_sequences, *shape, like.dtype, like.device)

    def image_features(self, pixels: Tensor) -> Tensor:
        """pixels [N, 3, S, S] -> [N, tokens_per_image, hidden]."""
        pixels = pixels.to(self.language_model.embed_tokens.weight)
        states = self.vision_tower(pixels, output_hidden_states=True).hidden_states
        rows = torch.cat([states[n] for n in self.config.feature_layers], dim=-1)
        rows = rows if self.config.keep_class_token else rows[:, 1:]
        act, projector = ACT2FN[self.config.hf.projector_hidden_act], self.multi_modal_projector
        return projector["linear_2"](act(projector["linear_1"](rows)))

    def forward(
        self, x: Tensor, plan: CompressionPlan, phase: Phase, cache: KVCache | None = None
    ) -> Tensor:
        """Rows packed by `plan.stages[0]` -> hidden rows packed by `plan.stages[-1]`.

        The K and V of the rows go into the cache, where they then count as cached. Nothing here
        waits for the device. Raises ValueError where the plan fits neither phase nor cache.
        """
        if any(plan.stages[0].cached_lens) and (phase is Phase.PREFILL or cache is None):
            raise ValueError("plan: expected one of whole prompts, got one behind cached rows")
        x = self.language_model(x, plan, cache, phase)
        if cache is not None:
            cache.advance(plan)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Hidden rows [T, hidden] -> float32 [T, vocab]."""
        x, _ = self.language_model.norm(x)
        tied = self.config.hf.tie_word_embeddings
        head = self.language_model.embed_tokens if tied else self.lm_head
        return F.linear(x, head.weight).float()

    generate = generate
