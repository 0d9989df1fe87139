"""What each step's attention metadata becomes in the stages behind a boundary.

vLLM builds metadata for every KV group from one description of the batch, in positions. A stage's
builder turns that into the stage's own rows, lengths and cache slots first, and hangs the movement
of rows on the result, where the model finds it. Everything the host computes comes from the layout;
lengths that vLLM knows only on the device stay there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from adsc_kernels.integrations.vllm.layout import RequestLayout, alignment
from adsc_kernels.plan import CompressionPlan, make_plan, to_device
from adsc_kernels.schedule import CompressionSchedule

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


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

    requests: which of the batch's requests have rows here; None where all are taken as they are.
    counts: rows of each of these.
    seq_lens: int32, keys of each; query_start_loc: int32, with its copy on the host.
    positions: int64, of each row among the survivors of its request.
    masked: of each row, whether its token is not in the stage; None where no row's is.
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
    masked: Tensor | None
    _places: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def places(self, block: int) -> tuple[Tensor, Tensor]:
        """Of each row, its block among its request's and its place in it; made once for all of a
        stage's groups, since each costs a step some launches."""
        if block not in self._places:
            self._places[block] = (self.positions // block, self.positions % block)
        return self._places[block]


class Step:
    """All stages of one batch.

    plan: the movement of rows; None where no row moves: no chunk touches an image, or no request
        has more than a row. Such a row stays where it is, also where its token is dropped: a CUDA
        graph of decode steps takes prompt chunks of one token too.
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
        self._masked = np.zeros(self._dropped.shape, bool)
        touched = [b for b, layout in enumerate(layouts) if layout.cuts(*chunks[b])]
        if touched and max(end - begin for begin, end in chunks) > 1:
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
        elif touched:
            self._mask(touched, layouts, chunks)

    def _mask(self, touched: Sequence[int], layouts: Sequence[RequestLayout], chunks: Any) -> None:
        """Requests of one row, whose token may be in no stage but the first few."""
        for b in touched:
            begin, end = chunks[b]
            for s in range(1, len(self._masked)):
                kept = layouts[b].kept_before(s, end)
                self._masked[s, b] = kept == layouts[b].kept_before(s, begin)
                # Kernels need not expect a row without a key; what it reads is not used.
                self._dropped[s, b] = end - max(kept, 1)

    def untouched(self, stage: int) -> bool:
        """The stage's keys and rows are those of the dense model: nothing was ever dropped."""
        return self.plan is None and not (self._dropped[stage].any() or self._masked[stage].any())

    def rows(self, stage: int) -> StageRows:
        """Those of a stage, made when its first group asks."""
        if stage not in self._stages:
            self._stages[stage] = self._make_rows(stage)
        return self._stages[stage]

    def _make_rows(self, stage: int) -> StageRows:
        common, device = self._common, self._common.seq_lens.device
        counts, starts, requests = np.diff(self._starts), self._starts, None
        dropped = self._dropped[stage]
        seq_lens_cpu = common.seq_lens_cpu_upper_bound[: len(counts)] - torch.from_numpy(dropped)
        seq_lens = common.seq_lens[: len(counts)] - to_device(dropped, device)
        query_start_loc = common.query_start_loc
        if self.plan is not None:
            counts = np.array(self.plan.stages[stage].seq_lens, np.int32)
            if not counts.all():
                # Kernels need not expect a request without a row, or without a key.
                chosen = counts.nonzero()[0]
                counts, seq_lens_cpu = counts[chosen], seq_lens_cpu[torch.from_numpy(chosen)]
                requests = to_device(chosen, device)
                seq_lens = seq_lens[requests]
            starts = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
            query_start_loc = to_device(starts, device)
        num_tokens = int(starts[-1])
        request_of_row = to_device(np.repeat(np.arange(len(counts)), counts), device)
        # A chunk's survivors follow one another, up to the request's last key.
        first = (seq_lens - query_start_loc[1 : len(counts) + 1]).long()
        positions = torch.arange(num_tokens, device=device) + first[request_of_row]
        masked = self._masked[stage]
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
            masked=to_device(masked, device)[request_of_row] if masked.any() else None,
        )


@dataclass
class EmptyStage:
    """The metadata of a stage without rows in this step: its layers do not run."""

    adsc: Step
