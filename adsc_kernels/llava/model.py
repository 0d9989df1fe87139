"""The thin LLaVA: a packed, variable-length Llama that drops vision tokens at stage boundaries.

The rows of all sequences lie one after the other, [T, hidden], without padding. What a stage needs
to know of them (cu_seqlens, positions, cache lengths, who survives) is in `plan.stages[s]`, made on
the host before the first layer runs. `Decoder.forward` is what to copy into another engine.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from adsc_kernels import adapters, checks, ops
from adsc_kernels.attention import graphable, varlen_attention
from adsc_kernels.attention_backends import DECODE, PREFILL
from adsc_kernels.backend import current
from adsc_kernels.cache import KVCache, LayerRows, Phase, StagePass, passes_of
from adsc_kernels.decode import LARGEST_BUCKET, DecodeState, bucket_of
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.graphs import Graphs
from adsc_kernels.hub import find_folder
from adsc_kernels.llava.config import LlavaConfig
from adsc_kernels.llava.generate import generate
from adsc_kernels.llava.processor import Processor
from adsc_kernels.plan import CompressionPlan
from adsc_kernels.pointwise import Place, Rope, rotate, silu_mul
from adsc_kernels.rows import Stage
from adsc_kernels.schedule import CompressionSchedule
from adsc_kernels.weights import DTYPES as WEIGHT_DTYPES
from adsc_kernels.weights import Joined, load_weights

GRAPHED_ROWS = 4096  # of a prefill: with more the device is behind the host anyway


class RMSNorm(nn.Module):
    """Adds to the residual stream and norms the sum."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.eps = config.hf.text_config.rms_norm_eps

    def forward(self, x: Tensor, residual: Tensor, same: Stage) -> tuple[Tensor, Tensor]:
        """(norm(sum), sum) of x + residual; same: the mapping of their rows to themselves."""
        return ops.downsample_add_rms_norm(x, residual, self.weight, same, eps=self.eps)

    def alone(self, x: Tensor) -> Tensor:
        """The norm of rows that nothing is to be added to."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Self-attention of one layer, grouped key heads or not."""

    def __init__(self, config: LlavaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.num_kv_heads = config.num_kv_heads
        bias = config.hf.text_config.attention_bias
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.qkv_proj = Joined(config.hidden_size, parts, bias)
        self.o_proj = nn.Linear(q, config.hidden_size, bias=bias)

    def forward(
        self, x: Tensor, rope: Rope, stage: StagePass, cache: LayerRows | None = None
    ) -> Tensor:
        """Rows [T, hidden] to [T, heads * head_dim], for `o_proj`; their K and V are written."""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        place, keys = None, stage.keys
        if cache is not None and stage.slots is not None:
            to = (cache.k, cache.v) if cache.address is None else cache.address.split(1)
            place = Place(to[0], to[1], stage.slots)
        q, k, v = rotate(qkv, rope, self.num_kv_heads, place)
        if cache is not None and keys is not None:
            k, v, address = cache
            keys = keys if address is None else dataclasses.replace(keys, address=address)
        return varlen_attention(q, k, v, stage.rows, keys=keys).flatten(-2)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        bias = config.hf.text_config.mlp_bias
        self.gate_up_proj = Joined(width, {"gate_proj": inner, "up_proj": inner}, bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Rows [T, hidden] to as many."""
        return self.down_proj(silu_mul(self.gate_up_proj(x)))


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

    frequencies: Tensor

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
        # Negative for the half of a head that turns the other way: sine is odd, cosine even.
        frequencies = torch.cat((-rotary.inv_freq, rotary.inv_freq))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def rope(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        """The rotation of rows at these positions, [T]."""
        angles = positions[:, None, None].float() * self.frequencies
        cos, sin = angles.cos() * self.rope_scale, angles.sin() * self.rope_scale
        return Rope(cos.to(dtype), sin.to(dtype))

    def forward(
        self, x: Tensor, passes: Sequence[StagePass], cache: Sequence[LayerRows] | None = None
    ) -> Tensor:
        """Rows of stage 0, [T, hidden], to rows of the last stage, before the final norm.

        cache: of each layer, as `KVCache.layers` has it.
        """
        held = [None] * len(self.layers) if cache is None else cache
        residual: Tensor | None = None
        for stage, following in zip(passes, (*passes[1:], None), strict=True):
            # What depends on the layout is made once here, and shared by the stage's layers.
            rope = self.rope(stage.positions, x.dtype)
            for n in stage.layers:
                layer = cast(Layer, self.layers[n])
                if residual is None:  # nothing is there to be added; a boundary may lie in front
                    residual = x if stage.rows.is_identity else ops.downsample(x, stage.rows)
                    x = layer.input_layernorm.alone(residual)
                else:
                    x, residual = layer.input_layernorm(x, residual, stage.same)
                x = layer.self_attn(x, rope, stage, held[n])
                same = stage.same
                if n == stage.layers[-1] and following is not None:
                    # The boundary. Rows that it drops have given their K and V, and are never read
                    # again: the rest of the layer in front of it is of survivors only.
                    same = following.same
                    if not following.rows.is_identity:
                        x, residual = ops.downsample_many([x, residual], following.rows)
                x = layer.self_attn.o_proj(x)
                x, residual = layer.post_attention_layernorm(x, residual, same)
                x = layer.mlp(x)
        return x if residual is None else residual + x


class Llava(nn.Module):
    """A LLaVA-1.5 with its processor and a compression schedule, made by `from_pretrained`."""

    def __init__(self, config: LlavaConfig, processor: Processor) -> None:
        super().__init__()
        self.config, self.processor = config, processor
        self.schedule = CompressionSchedule.dense(config.num_layers)
        self.graphs = Graphs()
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

    def compile(self, *args: Any, **options: Any) -> None:
        """Has the decoder compiled by `torch.compile`, which takes these.

        It is compiled for the first layout that runs, then once more for any lengths, of a whole
        prompt, of a chunk and of a step each. Models that share the weights share this.
        """
        self.language_model.compile(*args, **options)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.language_model.embed_tokens.weight.device

    def new_cache(self, num_sequences: int, block_size: int | None = None) -> KVCache:
        """An empty cache for a batch under this model's schedule: dense, or in blocks."""
        checks.integer("num_sequences", num_sequences, 0)
        like = self.language_model.embed_tokens.weight
        shape = (self.config.num_kv_heads, self.config.head_dim)
        return KVCache(self.schedule, num_sequences, *shape, like.dtype, like.device, block_size)

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
        passes = passes_of(plan, cache, phase)
        if cache is None:
            return self.language_model(x, passes)
        short = phase is Phase.PREFILL and len(x) <= GRAPHED_ROWS
        if short and self._graphed(PREFILL, cache):
            x = self._replay_prompt(x, plan, passes, cache)
        else:
            x = self.language_model(x, passes, cache.layers)
        cache.advance(plan)
        return x

    def _replay_prompt(
        self, x: Tensor, plan: CompressionPlan, passes: Sequence[StagePass], cache: KVCache
    ) -> Tensor:
        """By the graph of this layout, which writes into whichever cache it is told of."""

        def run(x: Tensor, addresses: Tensor, *slots: Tensor) -> Tensor:
            these = zip(passes, slots, strict=True)
            moved = [dataclasses.replace(stage, slots=rows) for stage, rows in these]
            return self.language_model(x, moved, cache.at(addresses))

        slots = [stage.slots for stage in passes if stage.slots is not None]
        key = ("prompt", current(), self._memory(), plan.layout, len(x))
        return self.graphs(key, run, x, cache.addresses(), *slots, tables=passes)

    def begin_decode(self, cache: KVCache, cached: Sequence[int], steps: int) -> DecodeState:
        """Where sequences stand that have run `cached` tokens each, for at most so many steps.

        Padded where the steps are to be graphs. Raises as DecodeState.
        """
        padded = None
        graphed = self._graphed(DECODE, cache)
        if graphed and (padded := bucket_of(len(cached))) is None:
            most = f"graphs of steps have at most {LARGEST_BUCKET} sequences"
            warnings.warn(f"{most}, this has {len(cached)}: it runs without", stacklevel=2)
        state = DecodeState(cache, cached, steps, padded)
        state.place = () if padded is None else (*self._memory(), cache.block_size)
        return state

    def decode(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """Logits, float32 [B, vocab], behind tokens [B] of sequences that stand as `state` says.

        Advances the state. Nothing waits for the device, or is read from it."""

        def run(tokens: Tensor, addresses: Tensor | None, *inputs: Tensor) -> Tensor:
            held = state.cache.layers if addresses is None else state.cache.at(addresses)
            x = self.language_model.embed_tokens(tokens)
            return self.logits(self.language_model(x, state.passes(*inputs), held))

        if state.padded is None or state.addresses is None:
            logits = run(tokens, None, *state.inputs)
        else:
            if padding := state.padded - state.size:
                tokens = F.pad(tokens, (0, padding))
            key = ("step", current(), state.place, state.padded, state.longest)
            inputs = (tokens, state.addresses, *state.inputs)
            logits = self.graphs(key, run, *inputs, tables=state.tables)[: state.size]
        state.advance()
        return logits

    def _graphed(self, phase: str, cache: KVCache) -> bool:
        """Whether calls of a phase are graphs in their turn, which serve any cache of this form."""
        weight, config = self.language_model.embed_tokens.weight, self.config
        device, dtype, size = weight.device, weight.dtype, config.head_dim
        form = (self.schedule, cache.block_size, config.num_kv_heads, size, dtype, device)
        served = cache.form == form and self.graphs.serve(device)
        return served and graphable(phase, device, dtype, size, cache.block_size)

    def _memory(self) -> tuple[Hashable, ...]:
        """What any graph of this model reads where it lies."""
        weights = (*self.language_model.parameters(), self.head.weight)
        return (self.schedule, *(w.data_ptr() for w in weights))

    def logits(self, x: Tensor) -> Tensor:
        """Hidden rows [T, hidden] -> float32 [T, vocab]."""
        return F.linear(self.language_model.norm.alone(x), self.head.weight).float()

    @property
    def head(self) -> nn.Embedding | nn.Linear:
        """The map to the vocabulary."""
        tied = self.config.hf.tie_word_embeddings
        return self.language_model.embed_tokens if tied else self.lm_head

    generate = generate
