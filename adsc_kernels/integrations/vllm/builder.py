"""The attention-metadata builder of a stage, around any backend's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from adsc_kernels.integrations.vllm.metadata import Batch, EmptyStage, StageRows

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

    # vLLM would hand a sibling group this group's metadata, with slots of its own in positions.
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
        self._seq_lens = torch.zeros(
            vllm_config.scheduler_config.max_num_seqs, dtype=torch.int32, device=device
        )
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
        step = self.adsc_batch.step(common_attn_metadata)
        stage = self.kv_cache_spec.stage
        if step.plan is None:
            rows = None if step.untouched(stage) else step.rows(stage)
            common_attn_metadata = self._in_place(common_attn_metadata, rows)
        else:
            rows = step.rows(stage)
            if rows.num_tokens == 0:
                common_attn_metadata.slot_mapping.fill_(-1)
                return EmptyStage(step)
            common_attn_metadata = self._compress(common_attn_metadata, rows)
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        metadata.adsc = step
        return metadata

    def _in_place(
        self, common: CommonAttentionMetadata, rows: StageRows | None
    ) -> CommonAttentionMetadata:
        """The batch's rows, requests and tables as they are, with the stage's lengths and slots:
        `rows`, or vLLM's own where nothing was dropped."""
        seq_lens = self._seq_lens[: common.num_reqs]
        if rows is None:
            seq_lens.copy_(common.seq_lens[: common.num_reqs])
            return common.replace(seq_lens=seq_lens)
        seq_lens.copy_(rows.seq_lens)
        self._write_slots(common.slot_mapping, common.block_table_tensor, rows)
        return common.replace(
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=rows.seq_lens_cpu,
            positions=None,
            _num_computed_tokens_cache=None,
        )

    def _compress(
        self, common: CommonAttentionMetadata, rows: StageRows
    ) -> CommonAttentionMetadata:
        """The rows that are left of the batch, of the requests that have any."""
        block_table = common.block_table_tensor
        if rows.requests is not None:
            block_table = block_table[rows.requests]
        self._write_slots(common.slot_mapping, block_table, rows)
        return common.replace(
            query_start_loc=rows.query_start_loc,
            query_start_loc_cpu=rows.query_start_loc_cpu,
            seq_lens=rows.seq_lens,
            seq_lens_cpu_upper_bound=rows.seq_lens_cpu,
            num_reqs=len(rows.counts),
            num_actual_tokens=rows.num_tokens,
            max_query_len=int(rows.counts.max()),
            max_seq_len=int(rows.seq_lens_cpu.max()),
            block_table_tensor=block_table,
            slot_mapping=common.slot_mapping[: rows.num_tokens],
            positions=rows.positions,
            is_prefilling=None,
            req_idx=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )

    def _write_slots(self, slots: torch.Tensor, block_table: torch.Tensor, rows: StageRows) -> None:
        """Where each row's key goes; none for padding and for a masked row. The attention layer
        reads its group's buffer, so they are written there."""
        block, own = self.kv_cache_spec.block_size, slots[: rows.num_tokens]
        index, offset = rows.places(block)
        torch.add(offset, block_table[rows.request_of_row, index], alpha=block, out=own)
        if rows.masked is not None:
            own.masked_fill_(rows.masked, -1)
        slots[rows.num_tokens :].fill_(-1)


def addresses(common: CommonAttentionMetadata) -> tuple[int, ...]:
    """Of what a graph reads of vLLM's buffers."""
    return tuple(getattr(common, name).data_ptr() for name in _CAPTURED)


def stage_builder(base: type[AttentionMetadataBuilder]) -> type[AttentionMetadataBuilder]:
    """The builder of a backend, for the layers behind a boundary."""
    return type(f"Adsc{base.__name__}", (StageBuilder, base), {})
