"""Renumbered positions of three axes (M-RoPE): what the model gives a smaller picture.

A picture is a run of vision tokens of one modality, as the model itself counts them: an image, or
a video whose frames have no text between them. In each stage

- the rows and the columns that are left of it are numbered without gaps from where it begins,
- its time keeps its distances: they are seconds, and a frame of which something stays stays,
- what follows moves up by as much as its extent has shrunk: from its first token's position to the
  largest of any axis, both included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adsc_kernels.integrations.hf.pictures import Span, runs
from adsc_kernels.integrations.hf.tables import copied


@dataclass(frozen=True)
class Pictures:
    """The pictures of a batch, numbered row after row, by columns [B, S].

    Attributes:
        inside: bool, the columns that hold a picture's token.
        before: how many pictures end in front of a column: for a picture's token its number.
        start: the same for the first column of a column's sequence.
        through: how many end in front of a column or with it.
        firsts: for each picture the flat index of its first column.
    """

    inside: np.ndarray
    before: np.ndarray
    start: np.ndarray
    through: np.ndarray
    firsts: np.ndarray

    @classmethod
    def of(cls, spans: Iterable[Span], kinds: np.ndarray, starts: np.ndarray | None) -> Pictures:
        """kinds: [B, S], the modality of a token. spans, starts: as BatchLayout takes them."""
        marks, ends = np.zeros(kinds.shape, int), np.zeros(kinds.shape, int)
        for row, column, length, *_ in spans:
            marks[row, column : column + length] = 1 + kinds[row, column]
        firsts = []
        for row, column, length in runs(marks):
            ends[row, column + length - 1] = 1
            firsts.append(row * kinds.shape[1] + column)
        through = ends.cumsum().reshape(ends.shape)
        before = through - ends
        begins = np.zeros(kinds.shape, bool) if starts is None else starts.copy()
        begins[:, :1] = True
        start = np.maximum.accumulate(np.where(begins, before, 0), axis=1)
        return cls(marks > 0, before, start, through, np.array(firsts, int))

    def tables(self, columns: np.ndarray) -> tuple[np.ndarray, ...]:
        """What a stage of these columns [B, S_s] (-1 for padding) takes: of its rows flat column,
        `before` and `start`; of its vision tokens flat row, picture, and which of them is the first
        of that picture."""
        batch = np.arange(len(columns))[:, None]
        source = batch * self.inside.shape[1] + columns.clip(min=0)
        before, start = self.before.ravel()[source], self.start.ravel()[source]
        rows = np.flatnonzero((columns >= 0) & self.inside.ravel()[source])
        picture = before.ravel()[rows]
        return source, before, start, rows, picture, np.searchsorted(picture, picture)


def axes(position_ids: Tensor | None, cache: Any, x: Tensor) -> Tensor:
    """The positions [3, B, S] that the decoder makes of what it is given: with those of text in
    front of the three, for all three axes alike, or none."""
    batch, width = x.shape[:2]
    if position_ids is None:
        past = 0 if cache is None else cache.get_seq_length()
        position_ids = torch.arange(width, device=x.device) + past
    if position_ids.dim() == 3 and len(position_ids) == 4:
        position_ids = position_ids[1:]
    return position_ids.expand(3, batch, width)


def renumbered(
    ids: Tensor, pictures: Pictures, stages: Sequence[np.ndarray]
) -> list[tuple[Tensor, Tensor]]:
    """Positions of every stage's rows.

    ids: [3, B, S]. stages: of each the columns [B, S_s] of its rows, -1 for padding.
    Returns for each stage its positions [3, B, S_s], of padding any; and [B, S], how far what
    follows a column has moved up. Waits for nothing.
    """
    host = [pictures.tables(columns) for columns in stages]
    shared = [pictures.firsts, pictures.through, pictures.start]
    on_device = iter(copied([*shared, *chain(*host)], ids.device))
    firsts, through, start = (next(on_device) for _ in shared)
    flat, count = ids.flatten(1), len(firsts)
    begins = flat[:, firsts]
    whole: Tensor | None = None
    found = []
    for columns, parts in zip(stages, host, strict=True):
        source, before, since, rows, picture, first = (next(on_device) for _ in parts)
        here = flat[:, source.flatten()]
        offsets = here[:, rows] - begins[:, picture]
        if whole is None:  # stage 0
            whole = _extents(offsets, picture, count)
        offsets = torch.cat([offsets[:1], _ranks(offsets[1:], picture, first)])
        shrunk = whole - _extents(offsets, picture, count)
        moved = nn.functional.pad(shrunk.cumsum(0), (1, 0))
        here[:, rows] = begins[:, picture] + offsets
        here = here.view(-1, *columns.shape) - (moved[before] - moved[since])
        found.append((here, moved[through] - moved[start]))
    return found


def _ranks(values: Tensor, picture: Tensor, first: Tensor) -> Tensor:
    """Of values [axes, T], their rank among the distinct ones of their picture.

    picture: [T], rising. first: [T], the first of the same picture.
    """
    keys, order = (values + (picture << 32)).sort(-1)
    steps = keys.ne(keys.roll(1, -1)).cumsum(-1)
    # Sorted or not, a picture's tokens take the same places.
    return torch.empty_like(steps).scatter_(-1, order, steps - steps[:, first])


def _extents(offsets: Tensor, picture: Tensor, count: int) -> Tensor:
    """[count] of pictures from their tokens' offsets [axes, T]; 0 of those without tokens."""
    largest = offsets.new_full((count,), -1)
    return largest.scatter_reduce(0, picture, offsets.amax(0), "amax") + 1
