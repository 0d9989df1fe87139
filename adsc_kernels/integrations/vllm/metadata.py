"""What each step's attention metadata becomes in the stages behind a boundary.

vLLM builds metadata for every KV group from one description of the batch, in positions. A stage's
builder turns that into the stage's own rows, lengths and cache slots first, and hangs the movement
of rows on the result, where the model finds it. Everything the host computes comes from the layout;
lengths that vLLM knows only on the device stay there.

All stages are made together, since a step has tens of groups and each launch costs the host as much
as its arithmetic: one upload, and none while requests decode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from adsc_kernels.integrations.vllm.layout import Columns, RequestLayout, alignment
from adsc_kernels.plan import CompressionPlan, Once, make_plan, to_device
from adsc_kernels.schedule import CompressionSchedule

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


class Batch:
    """What a model's stages share: the schedule, the batch that is being built, and what of the
    batch before may hold for it too.

    rows: the layouts of the requests of the batch, in its order; set by whoever knows them (the V1
        worker, the V2 model state). Rows beyond them are padding or dummies, and drop nothing.
    """

    def __init__(self, schedule: CompressionSchedule, align_block: int | None) -> None:
        self.schedule, self.align_block = schedule, align_block
        self.rows: Callable[[], Sequence[RequestLayout]] = tuple
        self._step: Step | None = None
        self._key: Tensor | None = None
        self._columns: Columns | None = None
        self._tables: Tables | None = None
        self._seq_lens: Tensor | None = None

    def allocate(self, max_num_seqs: int, device: torch.device) -> None:
        """The stages' lengths, once for all builders: CUDA graphs read them there."""
        if self._seq_lens is None:
            stages = self.schedule.num_stages - 1
            self._seq_lens = torch.zeros(stages, max_num_seqs, dtype=torch.int32, device=device)

    def step(self, common: CommonAttentionMetadata) -> Step:
        """Made once for each batch, of which vLLM tells each group the same query_start_loc_cpu."""
        if self._step is None or self._key is not common.query_start_loc_cpu:
            self._step = Step(self, common)
            self._key = common.query_start_loc_cpu
        return self._step

    def columns(self, size: int) -> Columns:
        """Those of the batch's `size` rows of requests."""
        layouts = list(self.rows())[:size]
        if self._columns is None or not self._columns.hold(layouts, size):
            self._columns = Columns(layouts, self.schedule.num_stages, size)
        return self._columns

    def tables(self, counts: np.ndarray, dropped: np.ndarray, device: torch.device) -> Tables:
        """Those of a batch with these rows; the former one's where they are the same."""
        key = (counts.shape, counts.tobytes(), dropped.tobytes())
        if self._tables is None or self._tables.key != key:
            self._tables = Tables(key, np.broadcast_to(counts, dropped.shape), dropped, device)
        return self._tables

    def seq_lens(self, dense: Tensor, tables: Tables) -> Tensor:
        """int32 [stages behind a boundary, requests]: keys of each request."""
        assert self._seq_lens is not None
        return torch.sub(dense, tables.dropped, out=self._seq_lens[:, : len(dense)])


class Tables:
    """What the device is told of a batch's rows in the stages behind a boundary.

    counts, dropped: int [stages, requests]: rows of each request in this step, and tokens before
        its last one that are not in the stage. key: equal where these are.
    Of each row, stage after stage: request; request_of_stage, counted through all stages.
    """

    def __init__(
        self, key: Any, counts: np.ndarray, dropped: np.ndarray, device: torch.device
    ) -> None:
        self.key = key
        ends = counts.cumsum().reshape(counts.shape)
        bounds = [0, *ends[:, -1].tolist()]
        self.rows = [slice(*some) for some in pairwise(bounds)]  # of each stage
        self.dense = [not some.any() for some in dropped]  # stages that dropped nothing
        told = to_device(np.array([dropped, counts, dropped + ends], np.int64), device)
        self.dropped, on_device, self.back = told
        rows = on_device.flatten()
        self.request_of_stage = torch.repeat_interleave(rows, output_size=bounds[-1])
        self.request = self.request_of_stage % counts.shape[1]
        self.numbers = torch.arange(bounds[-1], device=device)

    def positions(self, dense: Tensor) -> Tensor:
        """int64, of each row among the survivors of its request: a chunk's survivors follow one
        another, up to the request's last key. dense: keys of each request in stage 0."""
        first = (dense - self.back).flatten()
        return first.index_select(0, self.request_of_stage).add_(self.numbers)


@dataclass(frozen=True)
class StageRows:
    """The rows of a stage that has fewer than the batch: host numbers, and tensors on the device.

    requests: which of the batch's requests have rows here; None where all do.
    counts: rows of each of these.
    seq_lens: int32, keys of each; query_start_loc: int32, with its copy on the host.
    """

    num_tokens: int
    max_query_len: int
    max_seq_len: int
    requests: Tensor | None
    counts: np.ndarray
    seq_lens: Tensor
    seq_lens_cpu: Tensor
    query_start_loc: Tensor
    query_start_loc_cpu: Tensor


class Step:
    """All stages of one batch.

    plan: the movement of rows; None where no row moves: no chunk touches an image, or no request
        has more than a row. Such a row stays where it is, also where its token is dropped: a CUDA
        graph of decode steps takes prompt chunks of one token too.
    built: metadata of this step, by what groups can share.
    """

    def __init__(self, batch: Batch, common: CommonAttentionMetadata) -> None:
        counts = np.diff(common.query_start_loc_cpu.numpy())
        self._dense, self._device = common.seq_lens[: len(counts)], common.seq_lens.device
        self._ends = common.seq_lens_cpu_upper_bound.numpy()[: len(counts)]
        self.plan: CompressionPlan | None = None
        self._masked: np.ndarray | None = None
        self._stages: dict[int, StageRows] = {}
        self._slots: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self.built: dict[Any, Any] = {}
        # Tokens before a chunk's end that are not in a stage: exact also where the end is only a
        # bound, since that is so behind the prompt alone.
        columns, begins = batch.columns(len(counts)), self._ends - counts
        self._dropped = columns.dropped
        if (begins < columns.end).any():  # some prompt is not behind its images yet
            self._dropped = np.where(self._ends >= columns.end, columns.dropped, 0)
            touched = np.flatnonzero((begins < columns.end) & (self._ends > columns.begin))
            if touched.size:
                counts = self._cut(batch, columns, touched, counts)
        self._tables = batch.tables(counts, self._dropped, self._device)
        self._seq_lens = batch.seq_lens(self._dense, self._tables)

    def _cut(
        self, batch: Batch, columns: Columns, touched: np.ndarray, counts: np.ndarray
    ) -> np.ndarray:
        """Plan a batch of which `touched` chunks hold tokens of an image, given its requests' rows.
        Returns those of each stage."""
        moves = counts.max() > 1
        chunks = np.stack([self._ends - counts, self._ends], 1)
        plan = plan_chunks(batch, columns, touched, chunks, self._device if moves else None)
        lens = [(stage.seq_lens, stage.cached_lens) for stage in plan.stages[1:]]
        rows, cached = np.array(lens, np.int32).transpose(1, 0, 2)
        kept = rows + cached
        if moves:
            self.plan, counts = plan, rows
        else:
            self._masked = np.zeros(rows.shape, bool)
            self._masked[:, touched] = rows[:, touched] == 0
            # Kernels need not expect a row without a key; what it reads is not used.
            kept = np.maximum(kept, 1)
        self._dropped[:, touched] = (self._ends - kept)[:, touched]
        return counts

    def untouched(self, stage: int) -> bool:
        """The stage's keys and rows are those of the dense model: nothing was ever dropped."""
        masked = self._masked is not None and self._masked[stage - 1].any()
        return self.plan is None and self._tables.dense[stage - 1] and not masked

    def seq_lens(self, stage: int) -> Tensor:
        """int32, keys of each of the batch's requests in a stage behind a boundary."""
        return self._seq_lens[stage - 1]

    def seq_lens_cpu(self, stage: int) -> Tensor:
        """The same on the host, as far as it knows them."""
        return torch.from_numpy(self._ends - self._dropped[stage - 1])

    def positions(self, stage: int) -> Tensor:
        """int64, of each of the stage's rows among the survivors of its request."""
        return self._positions[self._tables.rows[stage - 1]]

    def masked(self, stage: int) -> Tensor | None:
        """Of each row, whether its token is not in the stage; None where no row's is."""
        if self._masked is None or not self._masked[stage - 1].any():
            return None
        return self._masks[self._tables.rows[stage - 1]]

    def slots(self, stage: int, block: int, width: int) -> tuple[Tensor, Tensor]:
        """Of each row of a stage: int64, where its block is in the batch's table of blocks, of
        `width` columns and flattened, and its place in the block."""
        if (stage, block, width) not in self._slots:
            index = torch.add(self._positions // block, self._tables.request, alpha=width)
            place = self._positions % block
            for s, rows in enumerate(self._tables.rows, 1):
                self._slots[s, block, width] = (index[rows], place[rows])
        return self._slots[stage, block, width]

    @Once
    def _positions(self) -> Tensor:
        return self._tables.positions(self._dense)

    @Once
    def _masks(self) -> Tensor:
        assert self._masked is not None
        told = to_device(self._masked, self._device).flatten()
        return told.index_select(0, self._tables.request_of_stage)

    def rows(self, stage: int) -> StageRows:
        """Those of a stage where rows move, made when its first group asks."""
        if stage not in self._stages:
            self._stages[stage] = self._make_rows(stage)
        return self._stages[stage]

    def _make_rows(self, stage: int) -> StageRows:
        assert self.plan is not None
        seq_lens, seq_lens_cpu = self.seq_lens(stage), self._ends - self._dropped[stage - 1]
        query_start_loc, requests = self.plan.stages[stage].cu_seqlens, None
        counts = np.array(self.plan.stages[stage].seq_lens, np.int32)
        if not counts.all():
            # Kernels need not expect a request without a row, or without a key.
            chosen = np.flatnonzero(counts)
            bounds = to_device(np.append(chosen, len(counts)), self._device)
            requests, query_start_loc = bounds[:-1], query_start_loc[bounds]
            counts, seq_lens = counts[chosen], seq_lens[requests]
            seq_lens_cpu = seq_lens_cpu[chosen]
        starts = np.zeros(len(counts) + 1, np.int32)
        counts.cumsum(out=starts[1:])
        return StageRows(
            num_tokens=int(starts[-1]),
            max_query_len=int(counts.max(initial=0)),
            max_seq_len=int(seq_lens_cpu.max(initial=0)),
            requests=requests,
            counts=counts,
            seq_lens=seq_lens,
            seq_lens_cpu=torch.from_numpy(seq_lens_cpu),
            query_start_loc=query_start_loc,
            query_start_loc_cpu=torch.from_numpy(starts),
        )


def plan_chunks(
    batch: Batch,
    columns: Columns,
    touched: np.ndarray,
    chunks: np.ndarray,
    device: torch.device | None,
) -> CompressionPlan:
    """The plan of a batch's chunks [requests, 2] of which those `touched` hold tokens of an image;
    what came before the others' was dropped long ago, so that they are as text to it."""
    lengths = np.maximum(chunks[:, 1], columns.end)
    return make_plan(
        batch.schedule,
        np.append(0, lengths.cumsum()),
        [(b, *span) for b in touched.tolist() for span in columns.layouts[b].spans],
        device=device,
        chunks=chunks,
        **alignment(batch.align_block),
    )


@dataclass
class EmptyStage:
    """The metadata of a stage without rows in this step: its layers do not run."""

    adsc: Step
