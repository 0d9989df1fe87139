"""The CUDA boundary_step, run on a CPU: all in one launch, against the references of its parts."""

from fractions import Fraction

import torch
from cases.row_bits import STRIDES, random_bits, same_bits, strided_rows
from cases.segment_tables import FakeStage, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from simt import Schedule, emulated, guards_intact, needs_simt, schedules, shifted
from test_rebuild_metadata import PATTERNS, fractions, layouts
from test_simt_norm import drawn
from torch import Tensor

from adsc_kernels import reference

pytestmark = needs_simt

hiddens = st.tuples(
    st.sampled_from([1, 7, 8, 64, 1032]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.booleans(),  # residual and norm
    st.sampled_from([0, 0, 1]),  # elements off alignment
)
others = st.lists(
    st.tuples(
        st.sampled_from([torch.int64, torch.float32, torch.bool, torch.bfloat16]),
        st.sampled_from([(), (3,), (64,), (2, 8)]),
        st.sampled_from(STRIDES),
    ),
    max_size=4,
)


def check(
    hidden: tuple,
    kinds: list[tuple],
    schedule: Schedule,
    stage: FakeStage,
    *,
    segments: Tensor | None = None,
    keep_indices: Tensor | None = None,
    layout: tuple[Tensor, Tensor] = (None, None),  # type: ignore[assignment]
    boundary: tuple = ([], "start", 0),
    spare: int = 0,
    metadata: tuple[Tensor, ...] = (),
) -> None:
    """stage: what the movement must come to; spare: rows that num_tokens leaves over."""
    width, dtype, norm, offset = hidden
    x, residual, weight = drawn(stage.num_tokens_in, width, dtype)
    x = shifted(x, offset)
    moved = [
        strided_rows(random_bits(len(x), trailing, kind, i), stride)
        for i, (kind, trailing, stride) in enumerate(kinds)
    ]
    normed = (residual, weight) if norm else (None, None)
    with emulated(schedule, x, *normed, *moved, segments, keep_indices, *layout):
        outs = torch.ops.adsc_simt.boundary_step(
            x,
            *normed,
            1e-5,
            moved,
            segments,
            keep_indices,
            *layout,
            *boundary,
            stage.num_tokens + spare,
        )
    wants = reference.downsample_many([x, *moved], stage)
    if norm:
        pair = reference.downsample_add_rms_norm(x, residual, weight, stage, 1e-5)
        wants[:1] = pair
    wants = [torch.cat([w, w.new_zeros(spare, *w.shape[1:])]) for w in wants]
    wants += metadata
    assert len(outs) == len(wants) and all(map(guards_intact, outs))
    for i, (out, want) in enumerate(zip(outs, wants, strict=True)):
        if norm and i == 0:
            torch.testing.assert_close(out, want)
        else:
            assert same_bits(out, want)


@settings(max_examples=40, deadline=None)
@given(stages(max_length=12), hiddens, others, schedules)
def test_of_a_stage(
    stage: FakeStage, hidden: tuple, kinds: list[tuple], schedule: Schedule
) -> None:
    check(hidden, kinds, schedule, stage, segments=stage.segments)
    rows = torch.tensor(reference.source_rows(stage), dtype=torch.int32)
    check(hidden, kinds, schedule, stage, keep_indices=rows)


@settings(max_examples=60, deadline=None)
@given(
    layouts(),
    st.tuples(fractions, fractions),
    st.sampled_from((*PATTERNS, "grid")),
    st.sampled_from([0, 0, 1, 40]),
    hiddens,
    others,
    schedules,
)
def test_of_a_layout(
    layout: tuple[Tensor, Tensor],
    keep: tuple[Fraction, Fraction],
    pattern: str,
    spare: int,
    hidden: tuple,
    kinds: list[tuple],
    schedule: Schedule,
) -> None:
    cu_seqlens, spans = layout
    height = int(spans[:, 3].max()) if pattern == "grid" and len(spans) else 0
    keeps = keep if pattern == "grid" else keep[:1]
    metadata = reference.rebuild_metadata(
        cu_seqlens, spans, keeps, pattern, height if pattern == "grid" else None
    )
    parts = [part for fraction in keeps for part in fraction.as_integer_ratio()]
    check(
        hidden,
        kinds,
        schedule,
        FakeStage(metadata[2], int(metadata[4]), int(cu_seqlens[-1])),
        layout=layout,
        boundary=(parts, pattern, height),
        spare=spare,
        metadata=metadata,
    )


def test_more_spans_than_a_block_has_threads() -> None:
    """Empty sequences, adjacent spans, and text whose place hangs on what is dropped before it."""
    generator = torch.Generator().manual_seed(0)
    bounds, spans = [0], []
    for sequence in range(300):
        position = int(torch.randint(0, 3, (), generator=generator))
        for _ in range(int(torch.randint(0, 4, (), generator=generator))):
            length = int(torch.randint(0, 9, (), generator=generator))
            spans.append([sequence, position, length])
            position += length + int(torch.randint(0, 2, (), generator=generator))
        bounds.append(bounds[-1] + position)
    layout = tuple(torch.tensor(values, dtype=torch.int32) for values in (bounds, spans))
    assert len(spans) > 256
    metadata = reference.rebuild_metadata(*layout, [Fraction(1, 3)], "linspace", None)
    stage = FakeStage(metadata[2], int(metadata[4]), bounds[-1])
    for enough in (1, 132 * 1024):
        check(
            (64, torch.bfloat16, True, 0),
            [(torch.int64, (), "dense")],
            (4, 0, enough),
            stage,
            layout=layout,
            boundary=([1, 3], "linspace", 0),
            spare=5,
            metadata=metadata,
        )
