"""The thin LLaVA: tower, projector, decoder and head, with a schedule."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel
from transformers.activations import ACT2FN

from ..cache import KVCache
from ..plan import CompressionPlan
from ..schedule import CompressionSchedule
from . import generate
from .config import LlavaConfig
from .decoder import Decoder, Phase
from .processor import Processor
from .weights import find_folder, load_weights


class Projector(nn.Module):
    """Rows of the tower, [..., vision width x feature layers], to rows of the decoder."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        width = config.hf.vision_config.hidden_size * len(config.vision_feature_layers)
        bias = config.hf.multimodal_projector_bias
        self.linear_1 = nn.Linear(width, config.hidden_size, bias=bias)
        self.act = ACT2FN[config.hf.projector_hidden_act]
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Both layers."""
        return self.linear_2(self.act(self.linear_1(x)))


class Llava(nn.Module):
    """A LLaVA-1.5 with a compression schedule, made by `from_pretrained`.

    `config`, `processor` (tokenizer and image processor) and `schedule` may be read.
    """

    def __init__(
        self, config: LlavaConfig, processor: Processor, schedule: CompressionSchedule
    ) -> None:
        super().__init__()
        self.config, self.processor, self.schedule = config, processor, schedule
        self.language_model = Decoder(config)
        with torch.device("meta"):  # the weights are still to come
            self.vision_tower = CLIPVisionModel(config.hf.vision_config)
            self.multi_modal_projector = Projector(config)
            if not config.tied_head:
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
    ) -> Llava:
        """Read a checkpoint in Hugging Face format: a local folder, or an id on the hub.

        schedule: an object, or text such as "8:1/4,16:1/4"; None drops nothing.
        device: None means CUDA where there is one. dtype: None means the checkpoint's.

        Raises FileNotFoundError, ValueError (damaged or inconsistent files) or UnsupportedError
        (another architecture).
        """
        folder = find_folder(path_or_id)
        config = LlavaConfig.from_folder(folder)
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dense = CompressionSchedule.dense(config.num_layers)
        model = cls(config, Processor(folder, config), dense).eval().with_schedule(schedule)
        load_weights(model, folder, target, dtype)
        return model.to(target)

    def with_schedule(self, schedule: CompressionSchedule | str | None) -> Llava:
        """The same model, on the same weights, under another schedule."""
        depth = self.config.num_layers
        if schedule is None:
            schedule = CompressionSchedule.dense(depth)
        elif isinstance(schedule, str):
            schedule = CompressionSchedule.parse(schedule, num_layers=depth)
        if schedule.num_layers != depth:
            raise ValueError(f"schedule: expected one of {depth} layers, got {schedule.num_layers}")
        twin = copy.copy(self)  # shares the modules
        twin.schedule = schedule
        return twin

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.language_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights, and so the cache, are of."""
        return self.language_model.embed_tokens.weight.dtype

    def new_cache(self, num_sequences: int) -> KVCache:
        """An empty cache for a batch under this model's schedule."""
        heads, size = self.config.num_kv_heads, self.config.head_dim
        return KVCache(self.schedule, num_sequences, heads, size, self.dtype, self.device)

    def image_features(self, pixels: Tensor) -> Tensor:
        """pixels [N, 3, S, S] -> [N, tokens_per_image, hidden]."""
        states = self.vision_tower(
            pixels.to(self.device, self.dtype), output_hidden_states=True
        ).hidden_states
        rows = torch.cat([states[n] for n in self.config.vision_feature_layers], dim=-1)
        return self.multi_modal_projector(rows if self.config.keep_class_token else rows[:, 1:])

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Packed token ids -> [T, hidden]; a picture's rows are the caller's to overwrite."""
        tokens = torch.tensor(ids, dtype=torch.int64).to(self.device, non_blocking=True)
        return self.language_model.embed_tokens(tokens)

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
        head = self.language_model.embed_tokens if self.config.tied_head else self.lm_head
        return F.linear(x, head.weight).float()

    generate = generate.generate
