"""Random movements of rows for the tests: what a planner would write, drawn by hypothesis."""

from dataclasses import dataclass
from fractions import Fraction

import torch
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels import reference
from adsc_kernels.rows import Stage


@dataclass(frozen=True)
class FakeStage:
    segments: Tensor
    num_tokens: int
    num_tokens_in: int


def by_stage(stage: Stage) -> tuple[Tensor, None, int]:
    """A stage as schemas have it: segments, keep_indices, num_tokens."""
    return stage.segments, None, stage.num_tokens


def stage_of(rows: list[list[int]], num_tokens: int, num_tokens_in: int) -> FakeStage:
    table = torch.tensor(rows, dtype=torch.int32).reshape(-1, 6)
    return FakeStage(table, num_tokens, num_tokens_in)


def source_rows(stage: FakeStage) -> list[int]:
    """The row of x that becomes each output row."""
    return reference.source_rows(*by_stage(stage))


@st.composite
def stages(draw: st.DrawFn, max_sequences: int = 4, max_length: int = 40) -> FakeStage:
    """A ragged batch of text and spans in every pattern, each sequence cut to a chunk [low, high).

    So segments begin inside a span (first > 0, src < 0) and some are empty.
    """
    table: list[list[int]] = []
    dst = base = 0
    for _ in range(draw(st.integers(0, max_sequences))):
        parts = []  # (length, kept rows, pattern); text keeps all
        for _ in range(draw(st.integers(0, 4))):
            length = draw(st.integers(0, max_length))
            if draw(st.booleans()):
                parts.append((length, length, "start"))
            else:
                denominator = draw(st.integers(1, 8))
                keep = Fraction(draw(st.integers(0, denominator)), denominator)
                pattern = draw(st.sampled_from(reference.PATTERNS))
                parts.append((length, reference.kept_count(length, keep), pattern))
        total = sum(length for length, _, _ in parts)
        low = draw(st.one_of(st.just(0), st.integers(0, total)))
        high = draw(st.one_of(st.just(total), st.integers(low, total)))
        position = 0
        for length, kept, pattern in parts:
            begin = min(max(low - position, 0), length)
            end = min(max(high - position, 0), length)
            first = reference.kept_before(pattern, begin, length, kept)
            after = reference.kept_before(pattern, end, length, kept)
            number = reference.PATTERNS.index(pattern)
            table.append([dst, base + position - low, length, kept, first, number])
            dst += after - first
            position += length
        base += high - low
    return stage_of(table, dst, base)


def image_stage(
    batch: int = 1, *, text: int = 101, vision: int = 576, kept: int = 144
) -> FakeStage:
    """A batch of prompts of one picture each, half of the text on either side of it."""
    table, dst, src = [], 0, 0
    for _ in range(batch):
        for span, keep in (
            (text // 2, text // 2),
            (vision, kept),
            (text - text // 2, text - text // 2),
        ):
            table.append([dst, src, span, keep, 0, 0])
            dst += keep
            src += span
    return stage_of(table, dst, src)
