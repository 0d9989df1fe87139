"""Which patches of a picture a schedule keeps, and how well they cover it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod, sqrt

import numpy as np

from adsc_kernels.plan import make_plan
from adsc_kernels.schedule import Boundary, CompressionSchedule

Grid = tuple[int, int]  # patches down, patches across


@dataclass(frozen=True)
class Coverage:
    """The survivors of one stage."""

    kept: frozenset[int]  # patches in reading order
    rows: int  # rows of the picture with a survivor
    columns: int  # columns with one
    farthest: float  # from a patch to the nearest survivor, at most, in patches; inf without any

    def deletes_columns(self, grid: Grid) -> bool:
        """Whether whole columns are gone while every row has survivors."""
        return self.rows == grid[0] and self.columns < grid[1]

    @classmethod
    def of(cls, kept: frozenset[int], grid: Grid) -> Coverage:
        """``ValueError`` where a patch lies outside the grid."""
        down, across = grid
        if not all(0 <= patch < down * across for patch in kept):
            raise ValueError(f"kept: expected patches in 0..{down * across - 1}, got {set(kept)}")
        places = [divmod(patch, across) for patch in kept]
        nearest = np.full(grid, np.inf)
        y, x = np.mgrid[0:down, 0:across]
        for row, column in places:
            np.minimum(nearest, (y - row) ** 2 + (x - column) ** 2, out=nearest)
        return cls(
            kept=kept,
            rows=len({row for row, _ in places}),
            columns=len({column for _, column in places}),
            farthest=sqrt(nearest.max()),
        )


def coverage(schedule: CompressionSchedule, grid: Grid) -> list[Coverage]:
    """Of one picture of ``grid`` patches, for every stage."""
    count = prod(grid)
    if min(grid) < 1:
        raise ValueError(f"grid: expected at least 1 x 1, got {grid[0]} x {grid[1]}")
    plan = make_plan(schedule, [0, count], [(0, 0, count, *grid)])
    return [Coverage.of(frozenset(stage.token_indices().tolist()), grid) for stage in plan.stages]


def under_pattern(schedule: CompressionSchedule, pattern: str, grid: Grid) -> CompressionSchedule:
    """The schedule under another pattern, with as many tokens in each stage as that can keep.

    Under ``grid``, rows and columns are thinned alike: of 24 x 24 patches a half is 17 x 17.
    """
    if pattern == schedule.pattern:
        return schedule
    if pattern != "grid":
        plain = tuple(replace(b, keep_rows=None, keep_columns=None) for b in schedule.boundaries)
        return replace(schedule, boundaries=plain, pattern=pattern)
    total, (height, width) = prod(grid), grid
    boundaries = []
    for boundary, count in zip(schedule.boundaries, schedule.kept(total)[1:], strict=True):
        side = sqrt(count / total)
        rows = Fraction(min(height, round(grid[0] * side)), height or 1)
        columns = Fraction(min(width, round(grid[1] * side)), width or 1)
        boundaries.append(Boundary(boundary.layer, rows * columns, rows, columns))
        height, width = round(height * rows), round(width * columns)
    return replace(schedule, boundaries=tuple(boundaries), pattern="grid")
