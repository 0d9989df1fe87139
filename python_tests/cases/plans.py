"""Hypothesis strategies for schedules and batch layouts."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import strategies as st

from adsc_kernels import Boundary, CompressionSchedule, StagePlan, make_plan
from adsc_kernels.schedule import PATTERNS, POSITIONS

shares = st.one_of(
    st.sampled_from([Fraction(0), Fraction(1), Fraction(1, 2), Fraction(1, 4), Fraction(1, 3)]),
    st.fractions(0, 1, max_denominator=40),
)


@st.composite
def schedules(draw, patterns=PATTERNS, max_boundaries=3) -> CompressionSchedule:
    pattern = draw(st.sampled_from(patterns))
    num_layers = draw(st.integers(max_boundaries, 12))
    layers = draw(st.lists(st.integers(0, num_layers - 1), max_size=max_boundaries, unique=True))
    boundaries = []
    for layer in layers:
        keep = draw(shares)
        if pattern == "grid":
            columns = draw(shares)
            boundaries.append(Boundary(layer, keep * columns, keep, columns))
        else:
            boundaries.append(Boundary(layer, keep))
    positions = draw(st.sampled_from(POSITIONS))
    return CompressionSchedule(num_layers, tuple(boundaries), pattern, positions)


@st.composite
def layouts(draw, grid: bool, max_sequences=4) -> tuple[list[int], list[tuple[int, ...]]]:
    """cu_seqlens and spans: ragged, empty, all text, adjacent spans, spans at either end."""
    cu_seqlens, spans = [0], []
    for sequence in range(draw(st.integers(0, max_sequences))):
        position = 0
        for _ in range(draw(st.integers(0, 3))):
            position += draw(st.integers(0, 5))
            if grid or draw(st.booleans()):
                height, width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
                length = height * (width + draw(st.integers(0, 2)))
                spans.append((sequence, position, length, height, width))
            else:
                length = draw(st.integers(0, 30))
                spans.append((sequence, position, length))
            position += length
        position += draw(st.integers(0, 5))
        cu_seqlens.append(cu_seqlens[-1] + position)
    return cu_seqlens, spans


@st.composite
def plans(draw, **options):
    """A schedule with a layout that fits it."""
    schedule = draw(schedules(**options))
    cu_seqlens, spans = draw(layouts(grid=schedule.pattern == "grid"))
    return schedule, cu_seqlens, spans


def image_plan(
    batch: int = 1, keep: str = "1/4", text: int = 32, vision: int = 64, tail: int = 32
) -> StagePlan:
    schedule = CompressionSchedule.parse(f"1:{keep}", num_layers=2)
    total = text + vision + tail
    cu_seqlens = [b * total for b in range(batch + 1)]
    return make_plan(schedule, cu_seqlens, [(b, text, vision) for b in range(batch)]).stages[1]
