"""The CUDA rebuild_metadata, run on a CPU, against the reference."""

from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import Schedule, emulated, guards_intact, needs_simt, schedules
from test_rebuild_metadata import PATTERNS, fractions, int32, layouts
from torch import Tensor

from adsc_kernels import reference

pytestmark = needs_simt


def check(
    layout: tuple[Tensor, Tensor],
    keep: list[Fraction],
    pattern: str,
    max_height: int | None,
    schedule: Schedule,
) -> None:
    parts = [part for fraction in keep for part in fraction.as_integer_ratio()]
    with emulated(schedule, *layout):
        outs = torch.ops.adsc_simt.rebuild_metadata(*layout, parts, pattern, max_height or 0)
    wants = reference.rebuild_metadata(*layout, parts, pattern, max_height or 0)
    for out, want in zip(outs, wants, strict=True):
        assert out.dtype == torch.int32 and torch.equal(out, want) and guards_intact(out)


@settings(max_examples=60, deadline=None)
@given(layouts(), fractions, st.sampled_from(PATTERNS), st.booleans(), schedules)
def test_equals_reference(
    layout: tuple[Tensor, Tensor],
    keep: Fraction,
    pattern: str,
    five: bool,
    schedule: Schedule,
) -> None:
    cu_seqlens, spans = layout
    spans = spans if five else spans[:, :3].contiguous()
    check((cu_seqlens, spans), [keep], pattern, None, schedule)


@settings(max_examples=60, deadline=None)
@given(layouts(), fractions, fractions, st.integers(0, 3), schedules)
def test_grid_equals_reference(
    layout: tuple[Tensor, Tensor],
    rows: Fraction,
    cols: Fraction,
    spare: int,
    schedule: Schedule,
) -> None:
    spans = layout[1]
    height = int(spans[:, 3].max()) + spare if len(spans) else spare
    check(layout, [rows, cols], "grid", height, schedule)


def test_thousands_of_sequences() -> None:
    """More than a block has threads, some without spans, some with two, one after another."""
    generator = torch.Generator().manual_seed(0)
    bounds, spans = [0], []
    for sequence in range(1100):
        position = int(torch.randint(0, 4, (), generator=generator))
        for _ in range(int(torch.randint(0, 4, (), generator=generator))):
            length = int(torch.randint(0, 9, (), generator=generator))
            spans.append([sequence, position, length])
            position += length + 1
        bounds.append(bounds[-1] + position)
    layout = int32(bounds, -1), int32(spans, -1, 3)
    check(layout, [Fraction(1, 3)], "center", None, (3, 0, 1))
