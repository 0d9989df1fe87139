"""A decoder in stages: one compiled unit for each, and the survivors gathered between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import subclass_attention_backend
from vllm.v1.kv_cache_interface import AttentionSpec

from adsc_kernels import ops
from adsc_kernels.integrations.vllm.builder import stage_builder
from adsc_kernels.integrations.vllm.config import image_span, layouts_of
from adsc_kernels.integrations.vllm.groups import choose_grouping
from adsc_kernels.integrations.vllm.metadata import Batch, Step
from adsc_kernels.integrations.vllm.spec import AdscStageSpec
from adsc_kernels.integrations.vllm.units import PiecewiseGraphs, make_units
from adsc_kernels.ops._dispatch import choose
from adsc_kernels.plan import StagePlan

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sequence import IntermediateTensors
    from vllm.v1.kv_cache_interface import KVCacheSpec


_TEXT = 100  # tokens beside the image in the request that groups are chosen for


class StageAttention(Attention):
    """An attention layer behind a boundary: another KV group, and metadata of the stage's rows."""

    adsc_batch: Batch
    adsc_stage: int
    adsc_bucket: int

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        dense = super().get_kv_cache_spec(vllm_config)
        return AdscStageSpec(
            **{field.name: getattr(dense, field.name) for field in fields(AttentionSpec)},
            schedule=self.adsc_batch.schedule,
            stage=self.adsc_stage,
            bucket=self.adsc_bucket,
        )


class StagedDecoder(nn.Module):
    """Mixed into one of vLLM's decoders by `cut_into_stages`: drops vision tokens between stages.

    The decoder: `embed_input_ids`, `norm`, and `layers` that take positions, hidden states and
    residual, and return the latter two, as those of Llama, Qwen2 and Qwen3.
    """

    layers: Any
    embed_input_ids: Callable[[Tensor | None], Tensor]
    norm: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]

    def set_stages(self, vllm_config: VllmConfig) -> Batch:
        """Cut the layers into stages. Returns what has to be told of each batch.

        vllm_config: that of the whole model, which holds the schedule.
        """
        layouts = layouts_of(vllm_config)
        schedule = layouts.schedule
        self.batch = batch = Batch(schedule, layouts.align_block)
        image = image_span(vllm_config)
        lengths = [image[1] - n + _TEXT for n in layouts.of_spans((image,)).dropped]
        grouping = choose_grouping(schedule, lengths, vllm_config.cache_config.block_size)
        for s in range(1, schedule.num_stages):
            numbers = schedule.layers_of_stage(s)
            for n in numbers:
                attention = self.layers[n].self_attn.attn
                attention.__class__ = StageAttention  # in place: it is registered under its name
                attention.adsc_batch, attention.adsc_stage = batch, s
                attention.adsc_bucket = int(n - numbers.start >= grouping.first[s])
                backend = attention.attn_backend
                builder = stage_builder(backend.get_builder_cls())
                attention.attn_backend = subclass_attention_backend("Adsc", backend, builder)
        units = make_units(self.layers, schedule, vllm_config)
        self.units = nn.ModuleList(unit or nn.Module() for unit in units)
        self.graphs = PiecewiseGraphs(vllm_config.compilation_config)
        self._has_layers = [unit is not None for unit in units]
        self._renumbers = schedule.positions == "renumber"
        self._last_layer = self.layers[-1].self_attn.attn.layer_name
        return batch

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        deepstack_input_embeds: IntermediateTensors | None = None,
    ) -> Tensor:
        """Hidden states of every row [T, hidden]; zeros where a token was dropped.

        positions: [T], or [3, T] for M-RoPE. deepstack_input_embeds: of Qwen3-VL, for layers that
            are all in stage 0.
        """
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual: Tensor | None = None
        num_rows, step, narrow = len(hidden), self._step(), False
        plan = None if step is None else step.plan
        for s, unit in enumerate(self.units):
            if s and plan is not None:
                stage = plan.stages[s]
                if stage.num_tokens == 0:
                    return hidden.new_zeros(num_rows, hidden.shape[1])
                if not stage.is_identity:
                    hidden, positions, residual = gather(hidden, positions, residual, stage)
                    narrow = True
            if s and self._renumbers and step is not None and not step.untouched(s):
                positions = step.positions(s)
            if not self._has_layers[s]:
                continue
            if s:
                hidden, residual = self.graphs.run(unit, positions, hidden, residual, narrow)
            else:
                hidden, residual = unit(positions, hidden, residual, deepstack_input_embeds)
        hidden, _ = self.norm(hidden, residual)
        if plan is None:
            return hidden
        # Sampling looks for rows where the batch has them. Stage by stage: the tables are there.
        moved = [stage for stage in plan.stages[1:] if not stage.is_identity]
        for stage in reversed(moved):
            hidden = spread(hidden, stage, num_rows if stage is moved[0] else stage.num_tokens_in)
        return hidden

    def _step(self) -> Step | None:
        """The batch's stages; None where all is dense: no boundaries, or vLLM's profiling runs."""
        metadata = get_forward_context().attn_metadata
        if not metadata or not self.batch.schedule.boundaries:
            return None
        return metadata[self._last_layer].adsc


def cut_into_stages(decoder: Any, vllm_config: VllmConfig) -> Batch:
    """Make a StagedDecoder of a decoder that vLLM built, and cut it.

    In place, since some of vLLM's multimodal models name their decoder's class themselves.
    """
    base = type(decoder)
    decoder.__class__ = type(f"Staged{base.__name__}", (StagedDecoder, base), {})
    decoder.do_not_compile = True  # as a whole: each stage is a unit
    return decoder.set_stages(vllm_config)


def gather(
    hidden: Tensor, positions: Tensor, residual: Tensor | None, stage: StagePlan
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows of a batch that survive into a stage."""
    one = positions.dim() == 1
    parts: Sequence[Tensor] = [positions] if one else positions.unbind()
    some = [x for x in (hidden, *parts, residual) if x is not None]
    # Rows behind num_tokens_in are padding.
    hidden, *rest = ops.downsample_many([x[: stage.num_tokens_in] for x in some], stage)
    parts, residual = rest[: len(parts)], None if residual is None else rest[-1]
    if one:
        return hidden, parts[0], residual
    # M-RoPE's three rows lie as far apart as vLLM's own, which is what a stage is compiled for.
    apart = positions.new_empty_strided((len(parts), len(hidden)), positions.stride())
    return hidden, torch.stack(parts, out=apart), residual


def spread(rows: Tensor, stage: StagePlan, num_rows: int) -> Tensor:
    """The inverse of `downsample`: [num_rows, ...] with zeros where a row was dropped. That is also
    its gradient, hence the op's name."""
    op = choose("upsample_grad", rows.device)
    if op is None:
        whole = rows.new_zeros(num_rows, *rows.shape[1:])
        return whole.index_copy_(0, stage.keep_indices(), rows)
    return op(rows, stage.segments, None, num_rows)
