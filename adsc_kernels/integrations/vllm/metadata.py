"""What each step's attention metadata becomes in the stages behind a boundary.

vLLM builds metadata for every KV group from one description of the batch, in positions. A stage's
builder turns that into the stage's own rows, lengths and cache slots first, and hangs the movement
of rows on the result, where the model finds it. Everything the host computes comes from the layout;
lengths that vLLM knows only on the device stay there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from adsc_kernels.integrations.vllm.layout import RequestLayout, alignment
from adsc_kernels.plan import CompressionPlan, make_plan
from adsc_kernels.schedule import CompressionSchedule

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata


class Batch:
    """What a model's stages share: the schedule, and the batch that is being built.

    rows: the layouts of the requests of the batch, in its order; set by whoever knows them (the V1
        worker, the V2 model state). Rows beyond them are padding or dummies, and drop nothing.
    """

    def __init__(self, schedule: CompressionSchedule, align_block: int | None) -> None:
        self.schedule, self.align_block = schedule, align_block
        self.rows: Callable[[], Sequence[RequestLayout]] = tuple
        self._step: Step | None = None
        self._key: Tensor | None = None

    def step(self, common: CommonAttentionMetadata) -> Step:
        """Made once for each batch, of which vLLM tells each group the same query_start_loc_cpu."""
        if self._step is None or self._key is not common.query_start_loc_cpu:
            self._step = Step(self, common)
            self._key = common.query_start_loc_cpu
        return self._step


@dataclass(frozen=True)
class StageRows:
    """One stage's part of a batch: host numbers, and tensors on the device.

    requests: which of the batch's requests have rows here; None where all have.
    counts: rows of each of these.
    seq_lens: int32, keys of each; query_start_loc: int32, with its copy on the host.
    positions: int64, of each row among the survivors of its request.
    """

    num_tokens: int
    requests: Tensor | None
    counts: np.ndarray
    seq_lens: Tensor
    seq_lens_cpu: Tensor
    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    positions: Tensor
    request_of_row: Tensor


class Step:
    """All stages of one batch.

    plan: the movement of rows; None where no chunk touches an image, so that no row is dropped.
    """

    def __init__(self, batch: Batch, common: CommonAttentionMetadata) -> None:
        starts = common.query_start_loc_cpu.numpy()
        ends = common.seq_lens_cpu_upper_bound.numpy()[: len(starts) - 1]
        begins = ends - np.diff(starts)
        layouts = list(batch.rows())[: len(ends)]
        self._common, self._starts = common, starts
        # Tokens before a chunk's end that are not in a stage: exact also where the end is only a
        # bound, since that is so behind the prompt alone.
        self._dropped = np.zeros((batch.schedule.num_stages, len(ends)), np.int32)
        chunks = list(zip(begins.tolist(), ends.tolist(), strict=True))
        for b, layout in enumerate(layouts):
            end = chunks[b][1]
            for s in range(1, batch.schedule.num_stages):
                self._dropped[s, b] = end - layout.kept_before(s, end)
        self._stages: dict[int, StageRows] = {}
        self.plan: CompressionPlan | None = None
        if any(layout.cuts(*chunk) for layout, chunk in zip(layouts, chunks, strict=False)):
            ends_of_images = [layout.end for layout in layouts] + [0] * (len(ends) - len(layouts))
            lengths = map(max, ends.tolist(), ends_of_images)
            self.plan = make_plan(
                batch.schedule,
                [0, *accumulate(lengths)],
                [(b, *span) for b, layout in enumerate(layouts) for span in layout.spans],
                device=common.seq_lens.device,
                chunks=chunks,
                **alignment(batch.align_block),
            )

    def untouched(self, stage: int) -> bool:
        """The stage's keys and rows are those of the dense model: nothing was ever dropped."""
        return self.plan is None and not self._dropped[stage].any()

    def rows(self, stage: int) -> StageRows:
        """Those of a stage, made when its first group asks."""
        if stage not in self._stages:
            self._stages[stage] = self._make_rows(stage)
        return self._stages[stage]

    def _make_rows(self, stage: int) -> StageRows:
        common, device = self._common, self._common.seq_lens.device
        counts = np.diff(self._starts)
        if self.plan is not None:
            counts = np.array(self.plan.stages[stage].seq_lens, np.int32)
        seq_lens_cpu = common.seq_lens_cpu_upper_bound[: len(counts)]
        seq_lens_cpu = seq_lens_cpu - torch.from_numpy(self._dropped[stage])
        seq_lens = common.seq_lens - upload(self._dropped[stage], device)
        requests = None
        if not counts.all():
            # Kernels need not expect a request without a row, or without a key.
            chosen = counts.nonzero()[0]
            counts, seq_lens_cpu = counts[chosen], seq_lens_cpu[torch.from_numpy(chosen)]
            requests = upload(chosen, device)
            seq_lens = seq_lens[requests]
        starts = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
        query_start_loc = upload(starts, device)
        num_tokens = int(starts[-1])
        request_of_row = upload(np.repeat(np.arange(len(counts)), counts), device)
        # A chunk's survivors follow one another, up to the request's last key.
        first = (seq_lens - query_start_loc[1:]).long()
        positions = torch.arange(num_tokens, device=device) + first[request_of_row]
        return StageRows(
            num_tokens=num_tokens,
            requests=requests,
            counts=counts,
            seq_lens=seq_lens,
            seq_lens_cpu=seq_lens_cpu,
            query_start_loc=query_start_loc,
            query_start_loc_cpu=torch.from_numpy(starts),
            positions=positions,
            request_of_row=request_of_row,
        )


@dataclass
class EmptyStage:
    """The metadata of a stage without rows in this step: its layers do not run."""

    adsc: Step


class StageBuilder:
    """Mixed into an attention backend's metadata builder, for the layers behind a boundary.

    Attributes of the built metadata: the backend's own, and `adsc`, the Step.
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
        # CUDA graphs of decode steps read lengths from where they lay at capture.
        self._seq_lens = torch.zeros(
            vllm_config.scheduler_config.max_num_seqs, dtype=torch.int32, device=device
        )

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """At most single-token decode: a stage's rows differ from the batch's in a prefill."""
        from vllm.v1.attention.backend import AttentionCGSupport

        support = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        return min(
            support, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda level: level.value
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        step = self.adsc_batch.step(common_attn_metadata)
        stage = self.kv_cache_spec.stage
        if not step.untouched(stage):
            rows = step.rows(stage)
            if rows.num_tokens == 0:
                common_attn_metadata.slot_mapping.fill_(-1)
                return EmptyStage(step)
            common_attn_metadata = self._compress(common_attn_metadata, rows)
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        metadata.adsc = step
        return metadata

    def _compress(
        self, common: CommonAttentionMetadata, rows: StageRows
    ) -> CommonAttentionMetadata:
        block, block_table = self.kv_cache_spec.block_size, common.block_table_tensor
        if rows.requests is not None:
            block_table = block_table[rows.requests]
        # The attention layer reads the slots of its group's buffer, so they are written there.
        blocks = block_table[rows.request_of_row, rows.positions // block]
        slots = common.slot_mapping[: rows.num_tokens]
        slots.copy_(blocks * block + rows.positions % block)
        common.slot_mapping[rows.num_tokens :].fill_(-1)
        num_reqs = len(rows.counts)
        seq_lens = self._seq_lens[:num_reqs]
        seq_lens.copy_(rows.seq_lens)
        return common.replace(
            query_start_loc=rows.query_start_loc,
            query_start_loc_cpu=rows.query_start_loc_cpu,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=rows.seq_lens_cpu,
            num_reqs=num_reqs,
            num_actual_tokens=rows.num_tokens,
            max_query_len=int(rows.counts.max()),
            max_seq_len=int(rows.seq_lens_cpu.max()),
            block_table_tensor=block_table,
            slot_mapping=slots,
            positions=rows.positions,
            is_prefilling=None,
            req_idx=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )


def stage_builder(base: type[AttentionMetadataBuilder]) -> type[AttentionMetadataBuilder]:
    """The builder of a backend, for the layers behind a boundary."""
    return type(f"Adsc{base.__name__}", (StageBuilder, base), {})


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
