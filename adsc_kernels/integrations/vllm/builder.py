"""The attention-metadata builder of a stage, around any backend's own."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from adsc_kernels.integrations.vllm.metadata import Batch, EmptyStage, Step

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

# What a CUDA graph reads where it lay at capture, beside the builder's own lengths.
_CAPTURED = ("slot_mapping", "block_table_tensor", "query_start_loc")


class StageBuilder:
    """Mixed into an attention backend's metadata builder, for the layers behind a boundary.

    Attributes of the built metadata: the backend's own, and `adsc`, the Step.

    CUDA graphs. A graph of decode steps reads a stage's lengths and slots where they lay at
    capture, when no request had an image. So lengths lie in the builder's own buffer in every step
    in which no row moves, also where they are the dense ones, and slots in the group's buffer.
    """

    kv_cache_spec: Any
    adsc_batch: Batch

    # vLLM would hand a sibling group this group's metadata, with slots of its own in positions:
    # `build` does it, for the groups of a stage, whose slots it writes first.
    supports_update_block_table = False

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
        **kwargs: Any,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)  # type: ignore[call-arg]
        context = vllm_config.compilation_config.static_forward_context
        self.adsc_batch = context[layer_names[0]].adsc_batch
        self.adsc_batch.allocate(vllm_config.scheduler_config.max_num_seqs, device)
        self._captured: tuple[int, ...] | None = None

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """At most single-token decode: a stage's rows differ from the batch's in a prefill."""
        from vllm.v1.attention.backend import AttentionCGSupport

        support = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        return min(
            support, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda level: level.value
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """The backend's own, which calls `build`; remembers where the graph will read."""
        self._captured = addresses(common_attn_metadata)
        return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        if self._captured not in (None, addresses(common_attn_metadata)):
            raise RuntimeError(
                f"{', '.join(_CAPTURED)}: expected where they lay when CUDA graphs were captured, "
                "got other addresses; --enforce-eager runs without graphs"
            )
        common, stage = common_attn_metadata, self.kv_cache_spec.stage
        table, slots = common.block_table_tensor, common.slot_mapping
        step = self.adsc_batch.step(common)
        if step.plan is not None:
            rows = step.rows(stage)
            if rows.num_tokens == 0:
                slots.fill_(-1)
                return EmptyStage(step)
            self._write_slots(slots, table, step)
            slots[rows.num_tokens :].fill_(-1)
            slots = slots[: rows.num_tokens]
            if rows.requests is not None:
                table = table[rows.requests]
        elif not step.untouched(stage):
            self._write_slots(slots, table, step)  # behind them vLLM wrote none
        key = (stage, type(self))
        if key in step.built:
            return super().update_block_table(step.built[key], table, slots)  # type: ignore[misc]
        if step.plan is None:
            common = self._in_place(common, step)
        else:
            common = self._compress(common, step, table, slots)
        metadata = super().build(common_prefix_len, common, fast_build)  # type: ignore[misc]
        metadata.adsc = step
        if super().supports_update_block_table:  # type: ignore[misc]
            step.built[key] = metadata
        return metadata

    def _in_place(self, common: CommonAttentionMetadata, step: Step) -> CommonAttentionMetadata:
        """The batch's rows, requests and tables as they are, with the stage's lengths."""
        stage = self.kv_cache_spec.stage
        if step.untouched(stage):
            return common.replace(seq_lens=step.seq_lens(stage))
        return common.replace(
            seq_lens=step.seq_lens(stage),
            seq_lens_cpu_upper_bound=step.seq_lens_cpu(stage),
            positions=None,
            _num_computed_tokens_cache=None,
        )

    def _compress(
        self,
        common: CommonAttentionMetadata,
        step: Step,
        table: torch.Tensor,
        slots: torch.Tensor,
    ) -> CommonAttentionMetadata:
        """The rows that are left of the batch, of the requests that have any."""
        stage = self.kv_cache_spec.stage
        rows = step.rows(stage)
        return common.replace(
            query_start_loc=rows.query_start_loc,
            query_start_loc_cpu=rows.query_start_loc_cpu,
            seq_lens=rows.seq_lens,
            seq_lens_cpu_upper_bound=rows.seq_lens_cpu,
            num_reqs=len(rows.counts),
            num_actual_tokens=rows.num_tokens,
            max_query_len=rows.max_query_len,
            max_seq_len=rows.max_seq_len,
            block_table_tensor=table,
            slot_mapping=slots,
            positions=step.positions(stage),
            is_prefilling=None,
            req_idx=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )

    def _write_slots(self, slots: torch.Tensor, block_table: torch.Tensor, step: Step) -> None:
        """Where each row's key goes; none for a masked row. The attention layer reads its group's
        buffer, so they are written there."""
        stage, block = self.kv_cache_spec.stage, self.kv_cache_spec.block_size
        index, place = step.slots(stage, block, block_table.shape[1])
        own = slots[: len(index)]
        torch.add(place, block_table.take(index), alpha=block, out=own)
        if (masked := step.masked(stage)) is not None:
            own.masked_fill_(masked, -1)


def addresses(common: CommonAttentionMetadata) -> tuple[int, ...]:
    """Of what a graph reads of vLLM's buffers."""
    return tuple(getattr(common, name).data_ptr() for name in _CAPTURED)


@cache
def stage_builder(base: type[AttentionMetadataBuilder]) -> type[AttentionMetadataBuilder]:
    """The builder of a backend, for the layers behind a boundary: one, so that groups can share."""
    return type(f"Adsc{base.__name__}", (StageBuilder, base), {})
