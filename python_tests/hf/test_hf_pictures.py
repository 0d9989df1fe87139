"""Pieces of pictures and placeholder tokens that don't fit each other."""

from __future__ import annotations

import numpy as np
import pytest

from adsc_kernels.integrations.hf.pictures import TEXT, Piece, alike, place

TWO = [Piece.grid(2, 2), TEXT, Piece.grid(1, 3)]  # 4 placeholders, 1 and 3


def test_pieces_lie_on_their_placeholders_in_every_copy_of_a_row():
    row = [0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1]
    want = [(0, 1, 4, 2, 2), (0, 8, 3, 1, 3), (1, 1, 4, 2, 2), (1, 8, 3, 1, 3)]
    assert place(np.array([row, row]), {1: TWO}) == want


@pytest.mark.parametrize(
    ("rows", "pieces", "says"),
    [
        ([[1] * 9], TWO, "expected 8 placeholder tokens for these pictures, got 9"),
        ([[0, 0]], TWO, "expected 8 placeholder tokens for these pictures, got 0"),
        ([[1, 1]], [], "expected 0 placeholder tokens for these pictures, got 2"),
        (
            [[1] * 8 + [0] * 2, [0] * 2 + [1] * 8],
            TWO,
            "expected rows repeated for beams to be alike",
        ),
        (
            [[1, 1, 1, 0, 1, 1, 1, 1]],
            alike(Piece.grid(2, 2)),
            "expected 4 placeholder tokens in the 4 from",
        ),
        ([[1, 1]], iter([Piece(1, 1)]), "expected as many placeholder tokens as pictures have"),
    ],
)
def test_what_does_not_fit_is_refused(rows, pieces, says):
    with pytest.raises(ValueError, match=f"input_ids: {says}"):
        place(np.array(rows), {1: pieces})
