"""The padded layout of a batch in every stage, on the host.

transformers runs a batch as [B, S] with a mask for padding. Rows lose different numbers of tokens,
so each stage has a layout of its own: its survivors in order, as wide as its longest row. Padding
goes where the batch has it: on the left where every row ends with a token (so that the last column
is the last token, which `generate` reads), else on the right. Padding is the first to be dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from adsc_kernels.integrations.hf.pictures import Span
from adsc_kernels.plan import CompressionPlan, make_plan
from adsc_kernels.schedule import CompressionSchedule


@dataclass(frozen=True)
class StageLayout:
    """One stage's rows [B, S_s] of the tokens that a pass runs.

    Attributes:
        columns: the column of `input_ids` that each row came from, -1 for padding.
        keep: flat index of each row in the stage before; for padding any. None where it is the
            same layout.
        before: how many tokens of its sequence were dropped in front of each row.
        is_full: nothing has been dropped since stage 0.
        seq_lens: rows of each sequence.
        sequence_ids: each row's number in its sequence; None unless several are packed in a row.
    """

    columns: np.ndarray
    keep: np.ndarray | None
    before: np.ndarray
    is_full: bool
    seq_lens: tuple[int, ...]
    sequence_ids: np.ndarray | None = None

    @cached_property
    def has_padding(self) -> bool:
        return bool((self.columns < 0).any())


class BatchLayout:
    """All stages of a batch whose spans are known.

    real: bool [B, S], False for padding. spans: as make_plan takes them, in columns of their row.
    starts: bool [B, S], where several sequences are packed into a row: True where one begins.

    Raises ValueError for spans that leave their row or hold padding, and for a row left empty.
    """

    def __init__(
        self,
        schedule: CompressionSchedule,
        real: np.ndarray,
        spans: Sequence[Span],
        starts: np.ndarray | None = None,
    ) -> None:
        self.batch, self.width = real.shape
        self._is_packed = starts is not None
        rows, columns = np.nonzero(real)  # of each token, sequence after sequence
        begins = np.diff(rows, prepend=-1) > 0
        if starts is not None:
            begins |= starts[rows, columns]
        offsets = np.flatnonzero(begins).tolist() + [len(rows)]
        plan = make_plan(schedule, offsets, _in_sequences(spans, real, offsets))
        self.align_right = bool(real[:, -1].all())
        self.stages = self._stages(plan, rows, columns)

    def _stages(
        self, plan: CompressionPlan, rows: np.ndarray, columns: np.ndarray
    ) -> list[StageLayout]:
        grid = np.full((self.batch, self.width), -1)
        grid[rows, columns] = columns
        seq_lens = plan.stages[0].seq_lens
        first = StageLayout(grid, None, np.zeros_like(grid), True, seq_lens)
        stages, ranks = [first], _ranks(seq_lens)
        for number, stage in enumerate(plan.stages[1:]):
            last = stages[-1]
            if stage.is_identity:
                stages.append(replace(last, keep=None))
                continue
            tokens = stage.token_indices().numpy()
            here = rows[tokens]
            counts = np.bincount(here, minlength=self.batch)
            if not counts.all():
                raise ValueError(
                    f"input_ids: expected a token that stays in every row, got none in row "
                    f"{int(counts.argmin())} behind boundary {number}"
                )
            width = int(counts.max())
            at = np.arange(len(tokens)) - (counts.cumsum() - counts)[here]
            if self.align_right:
                at += (width - counts)[here]
            grid, before = np.full((self.batch, width), -1), np.zeros((self.batch, width), int)
            grid[here, at] = columns[tokens]
            before[here, at] = ranks[tokens] - _ranks(stage.seq_lens)
            ids = None
            if self._is_packed:
                ids = np.zeros((self.batch, width), int)
                ids[here, at] = _ranks(stage.seq_lens)
            keep = _keep(last.columns, grid, self.width)
            stages.append(StageLayout(grid, keep, before, False, stage.seq_lens, ids))
        return stages

    def dropped_through(self, stage: StageLayout) -> np.ndarray:
        """[B, S], how many tokens of its row were dropped in front of a column or with it."""
        dropped = self.stages[0].columns >= 0
        rows, at = np.nonzero(stage.columns >= 0)
        dropped[rows, stage.columns[rows, at]] = False
        return dropped.cumsum(1)


def _ranks(seq_lens: Sequence[int]) -> np.ndarray:
    lens = np.array(seq_lens, int)
    return np.arange(lens.sum()) - np.repeat(lens.cumsum() - lens, lens)


def _keep(source: np.ndarray, target: np.ndarray, width: int) -> np.ndarray:
    """Flat indices into `source` [B, S'] of what `target` [B, S] holds, both in columns."""
    batch = np.arange(len(source))[:, None]
    place = np.zeros((len(source), width), int)
    rows, at = np.nonzero(source >= 0)
    place[rows, source[rows, at]] = at
    return batch * source.shape[1] + np.where(target < 0, 0, place[batch, target])


def _in_sequences(
    spans: Sequence[Span], real: np.ndarray, offsets: Sequence[int]
) -> list[tuple[int, ...]]:
    """From columns of a row to tokens of a sequence."""
    batch, width = real.shape
    number = real.ravel().cumsum() - 1  # of each token in the batch
    found = []
    for row, start, length, *grid in spans:
        if not (0 <= row < batch and start >= 0 and length >= 0 and start + length <= width):
            got = (row, start, length)
            raise ValueError(f"vision_spans: expected spans within [{batch}, {width}], got {got}")
        if not length:
            continue
        if not real[row, start : start + length].all():
            raise ValueError(f"vision_spans: expected no padding in {(row, start, length)}")
        token = int(number[row * width + start])
        sequence = int(np.searchsorted(offsets, token, side="right")) - 1
        found.append((sequence, token - offsets[sequence], length, *grid))
    return found
