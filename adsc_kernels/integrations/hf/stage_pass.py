"""One forward pass through the stages: what the hooks of the decoder's layers look up.

It is made before the first layer and travels to the layers among their keyword arguments, so that
a layer that is run again (gradient checkpointing) sees the pass it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adsc_kernels import ops
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.integrations.hf import ledger as ledgers
from adsc_kernels.integrations.hf import mrope
from adsc_kernels.integrations.hf.compat import columns_seen, known_parameters
from adsc_kernels.integrations.hf.layout import BatchLayout, StageLayout
from adsc_kernels.integrations.hf.ledger import Ledger, StagedCache
from adsc_kernels.integrations.hf.masks import MaskMaker, MaskRequest, of_kind
from adsc_kernels.integrations.hf.tables import Tables, copied, upload
from adsc_kernels.schedule import CompressionSchedule

if TYPE_CHECKING:
    from adsc_kernels.integrations.hf.deepstack import Deepstack

VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass
class StageRun:
    """What the layers of one stage are given in place of what the decoder gives them."""

    mask: Any  # or a dict by layer type
    tables: Tables | None  # None in a pass without pictures: all stages run the same rows
    shift: Tensor | None  # [B, 1]: how far positions moved up in earlier passes, if renumbered
    axes: Tensor | None = None  # [3, B, S_s]: M-RoPE's positions, if renumbered
    varlen: dict[str, Any] = field(default_factory=dict)
    rope: dict[Any, Any] = field(default_factory=dict)  # by layer type: source, result


class StagePass:
    """The stages of one pass; `None` among `runs` where a stage is as the decoder has it."""

    def __init__(
        self, schedule: CompressionSchedule, decoder: Any, runs: list[StageRun | None]
    ) -> None:
        self.schedule, self.runs = schedule, runs
        # Each layer's type, where they differ.
        self.kinds = getattr(decoder.config, "layer_types", None) or [None] * schedule.num_layers
        self.rotary = decoder.rotary_emb if schedule.positions == "renumber" else None
        # Whether it turns layers of other types by other angles.
        self.by_type = "layer_type" in known_parameters(type(decoder.rotary_emb).forward)
        self.deepstack: Deepstack | None = None
        self.after: tuple[StagedCache, Ledger] | None = None  # the cache's, once layers write to it

    def enter(self, layer: int, stage: int, x: Tensor, given: dict[str, Any]) -> Tensor:
        """Turn what a layer is given into what its stage has: x in return, `given` in place."""
        if self.after is not None:  # not before: until now the decoder has asked for lengths
            self.after[0].ledger, self.after = self.after[1], None
        run = self.runs[stage]
        if self.deepstack is not None and 0 < layer <= len(self.deepstack.features):
            last = self.runs[self.schedule.stage_of_layer(layer - 1)]
            x = self.deepstack.add(layer - 1, x, None if last is None else last.tables)
        if run is None:
            return x
        tables = run.tables
        first = self.schedule.boundaries[stage - 1].layer
        if layer == first and tables is not None and tables.keep is not None:
            rows = ops.downsample(x.flatten(0, 1), keep_indices=tables.keep.to(x.device))
            x = rows.view(len(x), -1, x.shape[-1])
        given["attention_mask"] = of_kind(run.mask, self.kinds[layer])
        self._move(layer, run, x, given)
        given.update(run.varlen)
        return x

    def _move(self, layer: int, run: StageRun, x: Tensor, given: dict[str, Any]) -> None:
        """Positions and their embeddings follow the rows."""
        kind = self.kinds[layer]
        ids, rope = given.get("position_ids"), given["position_embeddings"]
        source, result = run.rope.get(kind, (None, None))
        if source is not rope:
            result = self._positions(kind, run, x, ids, rope)
            run.rope[kind] = (rope, result)
        given["position_ids"], given["position_embeddings"] = result

    def _positions(
        self, kind: Any, run: StageRun, x: Tensor, ids: Tensor | None, rope: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        tables = run.tables
        if tables is not None:
            columns = tables.columns.to(x.device)
            rope = tuple(_take(part, columns) for part in rope)
            if ids is not None:
                # Without gaps: attention that looks for packed sequences takes a gap for one.
                ids = ids.expand(len(columns), -1).gather(1, columns) - tables.before.to(x.device)
        if self.rotary is not None:
            where = run.axes
            if where is None:
                if ids is None:
                    raise UnsupportedError("positions: expected layers that are given position_ids")
                where = ids = _moved(ids, run.shift)
            kinds = {"layer_type": kind} if self.by_type else {}
            rope = self.rotary(x, position_ids=where.to(x.device), **kinds)
        return ids, rope


def _moved(ids: Tensor, shift: Tensor | None) -> Tensor:
    return ids if shift is None else ids - shift.to(ids.device)


def _take(part: Tensor, columns: Tensor) -> Tensor:
    """cos or sin, [..., B or 1, S, D], of the rows of a stage."""
    batch, rows = columns.shape
    *lead, _, width, size = part.shape
    index = columns[..., None].expand(*lead, batch, rows, size)
    return part.expand(*lead, batch, width, size).gather(-2, index)


@dataclass
class PassInput:
    """What the model's entry found out of its arguments, for the decoder's hook.

    Attributes:
        layout: of the tokens of this pass, None where it has no pictures.
        mask: the 2D attention mask, [B, cached + S], or None.
        masks: ready made ones of each stage, where `generate` prepared a compiled step.
        hides: there are zeros in the mask, where the pass has a layout.
        block_ids: [B, S] or None; see MaskRequest.
        is_varlen: the lengths of packed sequences are among the arguments.
        pictures, axes: where M-RoPE positions are renumbered, the layout's pictures and [3, B, S].
    """

    layout: BatchLayout | None
    mask: Tensor | None
    masks: list[Any] | None = None
    hides: bool = False
    block_ids: Tensor | None = None
    is_varlen: bool = False
    pictures: mrope.Pictures | None = None
    axes: Tensor | None = None


def stage_masks(
    schedule: CompressionSchedule,
    cache: StagedCache | None,
    mask: Tensor | None,
    rows: Tensor,
    config: Any,
    make: MaskMaker,
) -> list[Any]:
    """Those of a pass without pictures; None for stages that nothing was dropped in."""
    masks: list[Any] = []
    for stage in range(schedule.num_stages):
        if cache is None or cache.ledger.is_full[stage]:
            masks.append(None)
            continue
        part = ledgers.view(cache, stage)
        total = columns_seen(part, rows.shape[1], rows.device)
        real = cache.ledger.real(stage, mask, total)
        masks.append(make(MaskRequest(config, rows, real, part)))
    return masks


def text_pass(
    schedule: CompressionSchedule,
    decoder: Any,
    cache: StagedCache | None,
    given: PassInput,
    rows: Tensor,
    make: MaskMaker,
) -> StagePass:
    """All stages run the same rows; their masks are as long as their caches."""
    masks = given.masks
    if masks is None:
        masks = stage_masks(schedule, cache, given.mask, rows, decoder.config, make)
    runs: list[StageRun | None] = []
    for stage, mask in enumerate(masks):
        if cache is None or cache.ledger.is_full[stage]:
            runs.append(None)
        else:
            shift = cache.ledger.shift(stage)
            axes = None if given.axes is None else _moved(given.axes, shift)
            runs.append(StageRun(mask, None, shift, axes))
    return StagePass(schedule, decoder, runs)


@torch.compiler.disable
def picture_pass(
    schedule: CompressionSchedule,
    decoder: Any,
    cache: StagedCache | None,
    given: PassInput,
    rows: Tensor,
    make: MaskMaker,
) -> StagePass:
    """Stages run their survivors, of which the cache's ledger will tell."""
    layout = given.layout
    assert layout is not None
    seen = 0 if cache is None else int(cache.get_seq_length())
    tables = upload(layout, seen, rows.device)
    axes, moved = _renumbered(schedule, layout, given, rows.device)
    shifts: list[Tensor | None] = [None] * len(tables)
    after = None
    if cache is not None:
        shifts = [cache.ledger.shift(stage) for stage in range(len(tables))]
        after = _tell(cache, seen, layout, tables, moved, given)
    runs: list[StageRun | None] = []
    for stage, (here, table) in enumerate(zip(layout.stages, tables, strict=True)):
        if here.is_full and (after is None or after.is_full[stage]):
            runs.append(None)
            continue
        request = _request(here, table, given, decoder.config, rows)
        if cache is not None and after is not None:
            _behind_cached(request, cache, after, stage, given)
        varlen = _varlen(here.seq_lens, rows.device) if given.is_varlen else {}
        where = _moved(axes[stage], shifts[stage]) if axes else None
        runs.append(StageRun(make(request), table, shifts[stage], where, varlen))
    run = StagePass(schedule, decoder, runs)
    if cache is not None and after is not None:
        run.after = (cache, after)
    return run


def _renumbered(
    schedule: CompressionSchedule, layout: BatchLayout, given: PassInput, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each stage, where positions are renumbered: those of M-RoPE, [3, B, S_s]; and [B, S], how
    far what follows a column of this pass has moved up."""
    if schedule.positions == "original":
        return [], []
    if given.axes is None or given.pictures is None:
        return [], copied([layout.dropped_through(here) for here in layout.stages], device)
    stages = [here.columns for here in layout.stages]
    found = mrope.renumbered(given.axes, given.pictures, stages)
    return [axes for axes, _ in found], [moved for _, moved in found]


def _tell(
    cache: StagedCache,
    seen: int,
    layout: BatchLayout,
    tables: list[Tables],
    moved: list[Tensor],
    given: PassInput,
) -> Ledger:
    """Which columns of the conversation each stage holds after this pass."""
    ledger = cache.ledger
    columns = [table.told for table in tables]
    if seen:
        tail = torch.arange(ledger.length, seen, device=columns[0].device)
        tail = tail.expand(layout.batch, -1)
        columns = [
            torch.cat([*ledger.columns[stage : stage + 1], tail, new], 1)
            for stage, new in enumerate(columns)
        ]
    ledgers.shorten(cache, [layout.width - here.columns.shape[1] for here in layout.stages])
    full = [here.is_full for here in layout.stages]
    padding = [given.hides or here.has_padding for here in layout.stages]
    behind = [ledger.moved_on(stage, seen, new) for stage, new in enumerate(moved)]
    return ledger.extended(seen + layout.width, columns, behind, full, padding)


def _request(
    here: StageLayout, table: Tables, given: PassInput, config: Any, rows: Tensor
) -> MaskRequest:
    """What the mask of a stage that runs fewer rows is made of, without a cache."""
    blocks, ids = given.block_ids, None
    if blocks is not None:
        blocks = blocks.gather(1, table.columns).masked_fill(~table.real, -1)
    if here.sequence_ids is not None:
        ids = torch.from_numpy(here.sequence_ids).to(rows.device, non_blocking=True)
    place = rows.new_empty((len(rows), here.columns.shape[1], 0))
    return MaskRequest(config, place, table.real if here.has_padding else None, None, ids, blocks)


def _behind_cached(
    request: MaskRequest, cache: StagedCache, after: Ledger, stage: int, given: PassInput
) -> None:
    """The same where rows come behind those of a cache, padding among them."""
    total = after.columns[stage].shape[1]
    request.cache = ledgers.view(cache, stage)
    request.real = after.real(stage, given.mask if given.hides else None, total)
    if request.block_ids is not None:
        behind = total - request.block_ids.shape[1]
        request.block_ids = nn.functional.pad(request.block_ids, (behind, 0), value=-1)


def _varlen(seq_lens: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """The lengths of packed sequences, as flash attention takes them."""
    offsets = torch.tensor([0, *accumulate(seq_lens)], dtype=torch.int32)
    offsets = offsets.to(device, non_blocking=True)
    return dict(zip(VARLEN, (offsets, offsets, max(seq_lens), max(seq_lens)), strict=True))
