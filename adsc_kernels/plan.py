"""The plan: everything about every stage of a batch, known on the host before the first layer.

``make_plan`` turns a schedule and the layout of a batch into one small table per stage. Nothing in
it depends on data, so it never reads a device tensor; a plan costs one upload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar, overload

import numpy as np
import torch

from adsc_kernels import checks
from adsc_kernels._planner import _C
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.schedule import CompressionSchedule
from adsc_kernels.segment_table import COLUMNS, PATTERN_CODES

T = TypeVar("T")


class Once(Generic[T]):
    """functools.cached_property without its lock, which Dynamo can't trace before Python 3.12."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self.make = make
        self.name = make.__name__
        self.__doc__ = make.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> Once[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> T | Once[T]:
        if instance is None:
            return self
        value = self.make(instance)
        if not torch.compiler.is_compiling():  # a graph's own tensors end with it
            instance.__dict__[self.name] = value
        return value


@dataclass(frozen=True, eq=False)
class StagePlan:
    """One stage's rows, and where each comes from. Rows are packed, sequence after sequence.

    Attributes:
        segments: int32 ``[S, 6]`` on the device, sorted by ``dst``: rows of the source stage (the
            stage before, or ``i`` of ``between(i, j)``) to rows of this one; ``csrc/segment.h``
            defines the columns. No index tensor is needed to follow it.
        cu_seqlens: int32 ``[B + 1]`` on the device, FlashAttention's row offsets.
        num_tokens: rows of this stage, a host int.
        num_tokens_in: rows of the source stage, a host int.
        max_seqlen: the longest sequence's rows, a host int.
        seq_lens: rows of each sequence, ``B`` host ints.
        seq_lens_in, cu_seqlens_in: the same of the source stage.
        cached_lens: rows of each sequence already in this stage's KV cache before these.
        is_identity: nothing was dropped on the way; ``downsample`` would be a plain copy.
    """

    segments: torch.Tensor
    cu_seqlens: torch.Tensor
    num_tokens: int
    num_tokens_in: int
    max_seqlen: int
    seq_lens: tuple[int, ...]
    seq_lens_in: tuple[int, ...]
    cu_seqlens_in: torch.Tensor
    cached_lens: tuple[int, ...]
    is_identity: bool
    _host_segments: np.ndarray = field(repr=False)
    _plan: CompressionPlan = field(repr=False)
    _stage: int = field(repr=False)

    @Once
    def kv_lens(self) -> tuple[int, ...]:
        """Keys that each sequence attends to in this stage: what is cached, and its own rows."""
        return tuple(a + b for a, b in zip(self.cached_lens, self.seq_lens, strict=True))

    @Once
    def only_drops(self) -> bool:
        """No sequence has rows that the source stage lacks: none is new, none was cached before."""
        lens = zip(self.seq_lens, self.seq_lens_in, strict=False)
        return (
            len(self.seq_lens) == len(self.seq_lens_in)
            and not any(self.cached_lens)
            and all(0 <= kept <= rows for kept, rows in lens)
        )

    @property
    def max_kv_len(self) -> int:
        return max((0, *self.kv_lens))

    @property
    def block_counts(self) -> tuple[int, ...]:
        """Cache blocks that each sequence needs in this stage; needs ``block_size`` in the plan."""
        size = self._plan.block_size
        if size is None:
            raise ValueError("block_counts: expected make_plan(..., block_size=), got none")
        return tuple(-(-length // size) for length in self.kv_lens)

    @Once
    def positions(self) -> torch.Tensor:
        """Position ids of this stage's rows, int64 ``[num_tokens]`` on the device.

        ``original``: the index in the prompt. ``renumber``: the index among the survivors.
        """
        if torch.compiler.is_compiling():
            return self._traced_positions()
        if self._plan.schedule.positions == "renumber":
            source, rows = self, np.arange(self.num_tokens)
        else:
            source, rows = self._plan.stages[0], self._plan._token_indices(self._stage)
        # A row's position: its index in its sequence's chunk, and where that chunk begins.
        seq_lens = np.array(source.seq_lens, np.int64)
        offsets = np.array(source.cached_lens, np.int64) - (seq_lens.cumsum() - seq_lens)
        return self._upload(rows + np.repeat(offsets, self.seq_lens))

    def _traced_positions(self) -> torch.Tensor:
        """``positions`` inside a graph, which can't expand a table on the host: the same by ops."""
        from adsc_kernels.ops import downsample  # ops import this module

        renumber = self._plan.schedule.positions == "renumber"
        source = self if renumber else self._plan.stages[0]
        device = source.cu_seqlens.device
        rows = torch.arange(source.num_tokens, device=device)
        sequence = torch.searchsorted(source.cu_seqlens, rows, right=True) - 1
        cached = torch.tensor(source.cached_lens, dtype=torch.int64, device=device)
        positions = rows + (cached - source.cu_seqlens[:-1])[sequence]
        for later in () if renumber else self._plan.stages[1 : self._stage + 1]:
            positions = downsample(positions, later)
        return positions

    def keep_indices(self) -> torch.Tensor:
        """The source stage's rows that this stage keeps, int64 ``[num_tokens]`` on the device."""
        return self._upload(self.source_rows())

    def token_indices(self) -> torch.Tensor:
        """Stage 0's rows that this stage keeps, int64 ``[num_tokens]`` on the device."""
        return self._upload(self._plan._token_indices(self._stage))

    def source_rows(self) -> np.ndarray:
        """``keep_indices`` on the host."""
        return _C.expand(self._host_segments, self.num_tokens)

    def _upload(self, values: np.ndarray) -> torch.Tensor:
        return to_device(values, self.segments.device)


class Rounded(NamedTuple):
    """A span of which a stage keeps more than the schedule asks, for ``align="block"``."""

    span: tuple[int, int, int]  # sequence, start, length
    stage: int
    wanted: int  # tokens, by the schedule
    kept: int  # tokens, a whole number of blocks less than the span has


@dataclass(frozen=True, eq=False)
class CompressionPlan:
    """All stages of one batch; ``stages[s]`` holds stage ``s``'s rows."""

    schedule: CompressionSchedule
    num_sequences: int
    block_size: int | None
    stages: tuple[StagePlan, ...]
    _roundings: np.ndarray = field(repr=False)

    @Once
    def rounded(self) -> tuple[Rounded, ...]:
        """What ``align="block"`` changed, stage by stage; empty without it."""
        return tuple(
            Rounded((sequence, start, length), *rest)
            for sequence, start, length, *rest in self._roundings.tolist()
        )

    @Once
    def layout(self) -> tuple[Any, ...]:
        """Equal for plans whose rows are alike in everything, hashable."""
        tables = [(s.seq_lens, s.cached_lens, s._host_segments.tobytes()) for s in self.stages]
        return (self.schedule, *tables)

    def between(self, i: int, j: int) -> StagePlan:
        """The mapping from stage ``i``'s rows straight to stage ``j``'s, for ``i <= j``."""
        last = len(self.stages) - 1
        checks.integer("between", i)
        checks.integer("between", j)
        if not 0 <= i <= j <= last:
            raise ValueError(f"between: expected 0 <= i <= j <= {last}, got {i} and {j}")
        target = self.stages[j]
        if j == i + 1:
            return target
        sources = np.arange(self.stages[i].num_tokens)
        for stage in self.stages[i + 1 : j + 1]:
            sources = sources[stage.source_rows()]
        host_segments = _C.compress(sources)
        return StagePlan(
            segments=to_device(host_segments, target.segments.device),
            cu_seqlens=target.cu_seqlens,
            num_tokens=target.num_tokens,
            num_tokens_in=self.stages[i].num_tokens,
            max_seqlen=target.max_seqlen,
            seq_lens=target.seq_lens,
            seq_lens_in=self.stages[i].seq_lens,
            cu_seqlens_in=self.stages[i].cu_seqlens,
            cached_lens=target.cached_lens,
            is_identity=target.num_tokens == self.stages[i].num_tokens,
            _host_segments=host_segments,
            _plan=self,
            _stage=j,
        )

    def _token_indices(self, stage: int) -> np.ndarray:
        rows = self.stages[0].source_rows()
        for later in self.stages[1 : stage + 1]:
            rows = rows[later.source_rows()]
        return rows


def make_plan(
    schedule: CompressionSchedule,
    cu_seqlens: Sequence[int] | np.ndarray | torch.Tensor,
    vision_spans: Iterable[Sequence[int]] | np.ndarray | torch.Tensor,
    device: torch.device | str | None = None,
    block_size: int | None = None,
    chunks: Iterable[Sequence[int]] | np.ndarray | torch.Tensor | None = None,
    align: str | None = None,
) -> CompressionPlan:
    """Plan every stage of a batch of prompts.

    Args:
        schedule: where and how much to drop.
        cu_seqlens: ``B + 1`` host ints: where each whole prompt begins, and the total.
        vision_spans: ``(sequence, start, length[, height, width])`` for each image, ``start``
            counted within its sequence; any number for each sequence, in any order, adjacent ones
            allowed. With ``height`` and ``width``, which the grid pattern needs, the span is
            ``height`` rows of ``width`` vision tokens; if ``length`` is longer than their product,
            each row is followed by ``length / height - width`` text tokens (LLaVA-NeXT's newline),
            which stay.
        device: where the tables go; the CPU if not given. One copy, no synchronisation.
        block_size: tokens of a cache block, for ``StagePlan.block_counts`` and ``align``.
        chunks: ``B`` pairs ``(begin, end)`` of positions to run now, where earlier positions are in
            the cache already: a chunk of a long prefill, or a later turn of a chat. A token
            survives in a chunk exactly if it survives in the whole prompt.
        align: ``"block"`` keeps, in each stage, up to ``block_size - 1`` tokens of a span more than
            the schedule asks, so that a multiple of ``block_size`` of the span's tokens is dropped:
            what follows keeps its place within its cache block, and a paged cache is compacted by
            editing its block table. ``CompressionPlan.rounded`` says what was rounded. The grid
            pattern keeps whole rows and columns, which can't be rounded: its spans must fit as
            they are, or ``UnsupportedError`` says which does not.

    Raises ``ValueError`` or ``TypeError`` that names the argument for spans that overlap or leave
    their sequence, a grid span without height and width, lengths that decrease, chunks outside the
    prompt, tensors on a device, or a ``device`` that can't be used.
    """
    checks.instance("schedule", schedule, CompressionSchedule)
    if block_size is not None:
        checks.integer("block_size", block_size, 1, checks.INT32_MAX)
    checks.choice("align", align, ("block", None))
    target = checks.usable_device("device", "cpu" if device is None else device)
    if align is not None and block_size is None:
        raise ValueError("align: expected a block_size to go with 'block', got none")
    tables, offsets, cached, roundings = _C.plan(
        _boundary_rules(schedule),
        _host_ints(cu_seqlens, "cu_seqlens"),
        _host_ints(vision_spans, "vision_spans"),
        None if chunks is None else _host_ints(chunks, "chunks"),
        1 if align is None or block_size is None else block_size,
    )
    batch = cached.shape[1]
    on_device = to_device(tables, target)
    cached_lens = cached.tolist()
    stages: list[StagePlan] = []
    plan = CompressionPlan(schedule, batch, block_size, (), roundings)
    if schedule.pattern == "grid" and plan.rounded:
        worst = plan.rounded[0]
        raise UnsupportedError(
            f"align: pattern 'grid' can't be rounded; expected that the span {worst.span} loses a "
            f"multiple of {block_size} tokens, got {worst.wanted} kept in stage {worst.stage}"
        )
    for stage, (begin, num_segments, is_identity) in enumerate(offsets):
        middle = begin + batch + 1
        end = middle + num_segments * len(COLUMNS)
        bounds = tables[begin:middle]
        seq_lens = tuple(np.diff(bounds).tolist())
        num_tokens = int(bounds[-1])
        cu_seqlens = on_device[begin:middle]
        before = stages[-1] if stages else None
        stages.append(
            StagePlan(
                segments=on_device[middle:end].view(num_segments, len(COLUMNS)),
                cu_seqlens=cu_seqlens,
                num_tokens=num_tokens,
                num_tokens_in=before.num_tokens if before else num_tokens,
                max_seqlen=max(seq_lens, default=0),
                seq_lens=seq_lens,
                seq_lens_in=before.seq_lens if before else seq_lens,
                cu_seqlens_in=before.cu_seqlens if before else cu_seqlens,
                cached_lens=tuple(cached_lens[stage]),
                is_identity=is_identity,
                _host_segments=tables[middle:end].reshape(num_segments, len(COLUMNS)),
                _plan=plan,
                _stage=stage,
            )
        )
    object.__setattr__(plan, "stages", tuple(stages))
    return plan


def _boundary_rules(schedule: CompressionSchedule) -> list[tuple[int, ...]]:
    code = PATTERN_CODES[schedule.pattern]
    return [
        (code, *(term for share in b.factors for term in (share.numerator, share.denominator)))
        for b in schedule.boundaries
    ]


def _host_ints(values: Any, name: str) -> Any:
    """What the planner reads: nested sequences of ints. Device tensors would need a sync."""
    if isinstance(values, torch.Tensor):
        if values.device.type != "cpu":
            raise TypeError(f"{name}: expected host ints, got a tensor on {values.device}")
        values = checks.tensor(name, values).tolist()
    elif isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, list | tuple):
        return values
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a sequence of ints, got {checks.kind(values)}")
    return list(values)


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy that nothing waits for; on the CPU the array itself."""
    tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    if device.type == "cuda":  # pinned, so that the copy needs no wait; others pin nothing
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
