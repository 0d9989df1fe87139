"""Pictures of handwritten digits on a canvas, and questions about them.

A picture is a 48 x 48 canvas of 3 x 3 cells. A cell is empty or holds one real handwritten digit
of scikit-learn's ``load_digits``, drawn inside a box of 12 x 12 pixels (6 x 6 patches of 2 x 2).
The digits used for training and those used for the held-out pictures are disjoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CANVAS = 48
PATCH = 2
CELLS = 3
CELL = CANVAS // CELLS
BOX = 12
SIDE = CANVAS // PATCH
EMPTY = -1
SPLIT_SEED = 2602
HELD_OUT_SHARE = 0.2

KINDS = ("cell", "count", "largest", "side", "where", "row", "all")


@dataclass(frozen=True)
class Question:
    """One question about one picture, with its only right answer."""

    kind: str
    text: str
    answer: str


@dataclass
class Batch:
    """Rendered pictures with what is true of them."""

    pixels: torch.Tensor  # uint8 [n, CANVAS, CANVAS]
    digits: torch.Tensor  # int64 [n, CELLS, CELLS], EMPTY where the cell is empty
    patches: torch.Tensor  # int64 [n, SIDE, SIDE]: the digit whose box covers the patch, or EMPTY


def split_digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images (float, 0..1) and labels of one split: ``"train"`` or ``"held-out"``."""
    data = load_digits()
    order = np.arange(len(data.target))
    train, test = train_test_split(
        order, test_size=HELD_OUT_SHARE, random_state=SPLIT_SEED, stratify=data.target
    )
    chosen = np.sort({"train": train, "held-out": test}[split])
    images = torch.from_numpy(data.images[chosen]).float() / 16.0
    return images, torch.from_numpy(data.target[chosen]).long()


class Painter:
    """Draws random pictures from one split of the digits."""

    def __init__(self, split: str, augment: bool) -> None:
        self.images, self.labels = split_digits(split)
        self.augment = augment
        self.by_label = [torch.nonzero(self.labels == d).flatten() for d in range(10)]

    def sample(self, n: int, rng: torch.Generator) -> Batch:
        """Draw ``n`` pictures; everything random comes from ``rng``."""
        digits = self._layout(n, rng)
        flat = digits.flatten()
        draw = torch.rand(flat.shape, generator=rng)
        source = torch.zeros_like(flat)
        for d, members in enumerate(self.by_label):
            here = flat == d
            source[here] = members[(draw[here] * len(members)).long()]
        boxes = self._boxes(self.images[source], rng)
        boxes[flat == EMPTY] = 0.0
        # Boxes start on even pixels, so that a digit never touches more than 6 x 6 patches.
        steps = (CELL - BOX) // PATCH + 1
        top = torch.randint(steps, flat.shape, generator=rng).tolist()
        left = torch.randint(steps, flat.shape, generator=rng).tolist()
        pixels = torch.zeros(n, CANVAS, CANVAS)
        patches = torch.full((n, SIDE, SIDE), EMPTY)
        span = BOX // PATCH
        for i, digit in enumerate(flat.tolist()):
            if digit == EMPTY:
                continue
            p, cell = divmod(i, CELLS * CELLS)
            r, c = divmod(cell, CELLS)
            y, x = r * CELL // PATCH + top[i], c * CELL // PATCH + left[i]
            pixels[p, y * PATCH : y * PATCH + BOX, x * PATCH : x * PATCH + BOX] = boxes[i]
            patches[p, y : y + span, x : x + span] = digit
        return Batch((pixels * 255).round().to(torch.uint8), digits, patches)

    def _layout(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Choose the digit of every cell.

        Each picture draws from a random handful of classes, so that repeats, absences and small
        maxima are all common.
        """
        digits = torch.empty(n, CELLS * CELLS, dtype=torch.long)
        for i in range(n):
            k = int(torch.randint(3, 11, (1,), generator=rng))
            classes = torch.randperm(10, generator=rng)[:k]
            digits[i] = classes[torch.randint(k, (CELLS * CELLS,), generator=rng)]
        empty = torch.rand(digits.shape, generator=rng) < 0.1
        empty[empty.all(1)] = False
        digits[empty] = EMPTY
        return digits.view(n, CELLS, CELLS)

    def _boxes(self, images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """Scale each 8 x 8 digit to 9..12 pixels somewhere in its box; distort it in training."""
        n = len(images)

        def uniform(low: float, high: float) -> torch.Tensor:
            return low + (high - low) * torch.rand(n, generator=rng)

        scale_x = uniform(9, BOX) / BOX
        scale_y = scale_x.clone()
        shift_x = uniform(-1, 1) * (1 - scale_x)
        shift_y = uniform(-1, 1) * (1 - scale_y)
        angle = torch.zeros(n)
        shear = torch.zeros(n)
        if self.augment:
            angle = uniform(-1, 1) * math.radians(14)
            shear = uniform(-0.25, 0.25)
            scale_x = scale_x * uniform(0.82, 1.12)
            scale_y = scale_y * uniform(0.88, 1.08)
        # theta maps a place in the box to a place in the 8 x 8 source: shift, turn, shear, scale.
        cos, sin = angle.cos(), angle.sin()
        turn = torch.stack([cos, -sin, sin, cos], 1).view(n, 2, 2)
        lean = torch.eye(2).repeat(n, 1, 1)
        lean[:, 0, 1] = shear
        zoom = torch.diag_embed(torch.stack([1 / scale_x, 1 / scale_y], 1))
        matrix = zoom @ lean @ turn
        offset = -(matrix @ torch.stack([shift_x, shift_y], 1)[:, :, None])
        grid = F.affine_grid(torch.cat([matrix, offset], 2), [n, 1, BOX, BOX], align_corners=False)
        boxes = F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]
        if self.augment:
            gamma = uniform(-0.5, 0.5).exp()[:, None, None]
            gain = uniform(0.75, 1.15)[:, None, None]
            boxes = (boxes.clamp(0, 1).pow(gamma) * gain).clamp(0, 1)
            noise = 0.04 * torch.randn(boxes.shape, generator=rng)
            boxes = torch.where(boxes > 0.02, (boxes + noise).clamp(0, 1), boxes)
        return boxes.clamp(0, 1)


def to_rgb(pixels: torch.Tensor) -> Image.Image:
    """Turn one grey canvas into the RGB picture that the processor expects."""
    return Image.fromarray(pixels.numpy()).convert("RGB")


def _word(digit: int) -> str:
    return "none" if digit == EMPTY else str(digit)


def cell_question(digits: torch.Tensor, row: int, column: int) -> Question:
    """Ask which digit stands in one cell (rows and columns count from 1)."""
    text = f"What digit is at row {row + 1} column {column + 1}?"
    return Question("cell", text, _word(int(digits[row, column])))


def count_question(digits: torch.Tensor, digit: int) -> Question:
    """Ask how often a digit occurs."""
    return Question("count", f"How many {digit}s are there?", str(int((digits == digit).sum())))


def largest_question(digits: torch.Tensor) -> Question:
    """Ask for the largest digit."""
    return Question("largest", "What is the largest digit?", str(int(digits.max())))


def side_questions(digits: torch.Tensor) -> list[Question]:
    """Ask "left or right" of every ordered pair that has one answer."""
    flat = digits.flatten().tolist()
    column = {d: i % CELLS for i, d in enumerate(flat) if d != EMPTY and flat.count(d) == 1}
    return [
        Question(
            "side",
            f"Is the {a} left or right of the {b}?",
            "left" if column[a] < column[b] else "right",
        )
        for a in column
        for b in column
        if column[a] != column[b]
    ]


def where_questions(digits: torch.Tensor) -> list[Question]:
    """Ask for the row and for the column of every digit that occurs once."""
    flat = digits.flatten().tolist()
    place = {d: divmod(i, CELLS) for i, d in enumerate(flat) if d != EMPTY and flat.count(d) == 1}
    return [
        Question("where", f"What {axis} is the {d} at?", str(place[d][i] + 1))
        for d in place
        for i, axis in enumerate(("row", "column"))
    ]


def row_question(digits: torch.Tensor, row: int) -> Question:
    """Ask for the digits of one row."""
    words = " ".join(_word(d) for d in digits[row].tolist())
    return Question("row", f"Read row {row + 1}.", words)


def all_question(digits: torch.Tensor) -> Question:
    """Ask for all digits in reading order: the caption."""
    words = " ".join(_word(d) for d in digits.flatten().tolist())
    return Question("all", "Read the digits.", words)


def all_questions(digits: torch.Tensor) -> list[Question]:
    """Every question that can be asked about one picture."""
    return [
        *(cell_question(digits, r, c) for r in range(CELLS) for c in range(CELLS)),
        *(count_question(digits, d) for d in range(10)),
        largest_question(digits),
        *side_questions(digits),
        *where_questions(digits),
        *(row_question(digits, r) for r in range(CELLS)),
        all_question(digits),
    ]


def _choose(items: list[Question], n: int, rng: torch.Generator) -> list[Question]:
    return [items[i] for i in torch.randperm(len(items), generator=rng)[:n].tolist()]


def sample_questions(
    digits: torch.Tensor, rng: torch.Generator, per_kind: dict[str, int]
) -> list[Question]:
    """Choose up to ``per_kind[kind]`` different questions of each kind about one picture.

    Half of the counted digits are present, as far as there are enough of them.
    """
    pool = all_questions(digits)
    chosen: list[Question] = []
    for kind, n in per_kind.items():
        items = [q for q in pool if q.kind == kind]
        if kind == "count":
            present = _choose([q for q in items if q.answer != "0"], (n + 1) // 2, rng)
            rest = [q for q in items if q not in present]
            chosen += present + _choose(rest, n - len(present), rng)
        else:
            chosen += _choose(items, n, rng)
    return chosen


def held_out_picture(painter: Painter, seed: int, index: int) -> tuple[Batch, torch.Generator]:
    """Draw picture ``index`` of the sequence ``seed``; it does not depend on the others."""
    rng = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return painter.sample(1, rng), rng
