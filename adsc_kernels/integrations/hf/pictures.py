"""Where the vision tokens of a batch lie: pieces of pictures, placed on placeholder tokens.

A family says what its pictures are made of, in order; a prompt says where placeholders are. Nothing
of transformers here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise, repeat
from typing import NamedTuple

import numpy as np

Span = tuple[int, ...]  # row of the batch, first column, length[, height, width]


class Piece(NamedTuple):
    """A run of columns that belongs to one picture.

    Attributes:
        length: columns it takes, text between its rows included.
        placeholders: how many of these hold the placeholder token.
        height, width: of its grid of vision tokens; 0 and 0 where it has none.
        is_text: it stays whole, such as the newline behind a video.
    """

    length: int
    placeholders: int
    height: int = 0
    width: int = 0
    is_text: bool = False

    @classmethod
    def grid(cls, height: int, width: int, between: int = 0, *, written: bool = True) -> Piece:
        """Rows of vision tokens, each with `between` text tokens behind it.

        written: these have the placeholder's id too, as LLaVA-NeXT's newlines do.
        """
        length = height * (width + between)
        return cls(length, length if written else height * width, height, width)


TEXT = Piece(1, 1, is_text=True)


def place(kinds: np.ndarray, pieces: dict[int, Iterable[Piece]]) -> list[Span]:
    """Spans of all rows, sorted.

    kinds: [B, S], 0 for text, else which modality's placeholder a token is.
    pieces: for each modality its pieces in order, row after row of the batch; endless where all are
      alike. A list that is too short by a whole factor is that of a batch whose every row was
      repeated so many times, as `generate` does for beams.

    Raises ValueError where placeholders and pieces don't fit.
    """
    spans: list[Span] = []
    for kind, known in pieces.items():
        where = kinds == kind
        for row, piece, column in _walk(where, known):
            if piece.is_text:
                continue
            grid = (piece.height, piece.width) if piece.height else ()
            spans.append((row, column, piece.length, *grid))
    return sorted(spans)


def _walk(where: np.ndarray, known: Iterable[Piece]) -> Iterator[tuple[int, Piece, int]]:
    copies = 1
    if isinstance(known, Sequence):
        total, each = int(where.sum()), sum(piece.placeholders for piece in known)
        copies = total // each if each else 1
        if not copies or copies * each != total:
            raise ValueError(
                f"input_ids: expected {each} placeholder tokens for these pictures, got {total}"
            )
    source = iter(known)
    for first in range(0, len(where), copies):
        group = where[first : first + copies]
        found = list(_walk_row(group[0], source))
        for n, row in enumerate(group):
            if not np.array_equal(row, group[0]):
                raise ValueError("input_ids: expected rows repeated for beams to be alike")
            yield from ((first + n, piece, column) for piece, column in found)


def _walk_row(row: np.ndarray, source: Iterator[Piece]) -> Iterator[tuple[Piece, int]]:
    columns = np.flatnonzero(row)
    taken = 0
    while taken < len(columns):
        column, piece = int(columns[taken]), next(source, None)
        if piece is None:
            raise ValueError("input_ids: expected as many placeholder tokens as pictures have")
        inside = int(row[column : column + piece.length].sum())
        if inside != piece.placeholders or column + piece.length > len(row):
            raise ValueError(
                f"input_ids: expected {piece.placeholders} placeholder tokens in the "
                f"{piece.length} from column {column} on, got {inside}"
            )
        yield piece, column
        taken += inside


def runs(kinds: np.ndarray) -> list[Span]:
    """Spans from token types alone: each run of one kind, of unknown height and width."""
    spans: list[Span] = []
    for row, types in enumerate(kinds):
        edges = np.flatnonzero(np.diff(types, prepend=0, append=0)).tolist()
        spans += [(row, a, b - a) for a, b in pairwise(edges) if types[a]]
    return spans


def alike(piece: Piece) -> Iterable[Piece]:
    """As many as there are."""
    return repeat(piece)


def joined(pictures: Iterable[Iterable[Piece]]) -> list[Piece]:
    """The pieces of several pictures."""
    return list(chain.from_iterable(pictures))
