"""boundary_step in Triton against its parts in the reference, from a table, a list and a layout."""

from fractions import Fraction

import torch
from cases.segment_tables import FakeStage, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from test_downsample import random_bits, same_bits
from test_rebuild_metadata import PATTERNS, fractions, int32, layouts
from torch import Tensor

from adsc_kernels import reference
from adsc_kernels.triton.boundary import boundary_step

NO_LAYOUT = (None, None, [], "start", 0)


def tensors_of(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden, residual, weight = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, width), (rows, width), (width,))
    )
    others = [random_bits(rows, (3,), torch.int64, 1), random_bits(rows, (), torch.bool, 2)]
    return [hidden, residual, weight, *others]


def check(outputs: list[Tensor], tensors: list[Tensor], norm: bool, rows: list[int]) -> None:
    """rows: the source row of each output row that has one; the others are 0."""
    hidden, residual, weight, *others = tensors
    source = torch.tensor(rows, dtype=torch.int64)
    moved = outputs[2:] if norm else outputs
    for out, x in zip(moved, others if norm else [hidden, *others], strict=True):
        assert same_bits(out[: len(rows)], x[source])
        assert not out[len(rows) :].any()
    if norm:
        wanted = reference.downsample_add_rms_norm(
            hidden, residual, weight, eps=1e-6, keep_indices=source
        )
        assert torch.equal(outputs[1][: len(rows)], wanted[1])
        torch.testing.assert_close(outputs[0][: len(rows)], wanted[0], rtol=2**-7, atol=1e-30)
        for out in outputs[:2]:
            assert not out[len(rows) :].any()


@settings(max_examples=20, deadline=None)
@given(
    stage=stages(max_sequences=2, max_length=12),
    norm=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    width=st.sampled_from([0, 3, 16, 40]),
    with_others=st.booleans(),
)
def test_table_and_list(
    stage: FakeStage, norm: bool, dtype: torch.dtype, width: int, with_others: bool
) -> None:
    tensors = tensors_of(stage.num_tokens_in, width, dtype)
    if not with_others:
        del tensors[3:]
    hidden, residual, weight, *others = tensors
    first = (hidden, *((residual, weight) if norm else (None, None)), 1e-6, others)
    rows = reference.source_rows(stage)
    outputs = boundary_step(*first, stage.segments, None, *NO_LAYOUT, stage.num_tokens)
    check(outputs, tensors, norm, rows)
    indices = torch.tensor(rows, dtype=torch.int32)
    outputs = boundary_step(*first, None, indices, *NO_LAYOUT, stage.num_tokens)
    check(outputs, tensors, norm, rows)


@settings(max_examples=30, deadline=None)
@given(
    layout=layouts(),
    rows=fractions,
    cols=fractions,
    pattern=st.sampled_from([*PATTERNS, "grid"]),
    norm=st.booleans(),
    spare=st.integers(0, 9),
    unread=st.integers(0, 2),
)
def test_layout(
    layout: tuple[Tensor, Tensor],
    rows: Fraction,
    cols: Fraction,
    pattern: str,
    norm: bool,
    spare: int,
    unread: int,
) -> None:
    """spare: rows allocated past the stage's. unread: rows of hidden past the batch's."""
    cu_seqlens, spans = layout
    shares = [rows, cols] if pattern == "grid" else [rows]
    height = int(spans[:, 3].max()) if pattern == "grid" and len(spans) else 0
    max_height = height if pattern == "grid" else None
    metadata = reference.rebuild_metadata(cu_seqlens, spans, shares, pattern, max_height)
    num_rows, num_tokens = int(cu_seqlens[-1]), int(metadata[4])
    moved = reference.source_rows(FakeStage(metadata[2], num_tokens, num_rows))
    tensors = tensors_of(num_rows + unread, 8, torch.float32)
    hidden, residual, weight, *others = tensors
    keep = [part for share in shares for part in (share.numerator, share.denominator)]
    outputs = boundary_step(
        *(hidden, *((residual, weight) if norm else (None, None)), 1e-6, others, None, None),
        *(cu_seqlens, spans, keep, pattern, height, num_tokens + spare),
    )
    check(outputs[:-6], tensors, norm, moved)
    for found, wanted in zip(outputs[-6:], metadata, strict=True):
        assert found.dtype == torch.int32 and torch.equal(found, wanted)


def test_more_spans_than_are_looked_at_together() -> None:
    spans = int32([[0, 3 * i, 3 - i % 2] for i in range(150)], 150, 3)
    cu_seqlens = int32([0, 460], 2)
    metadata = reference.rebuild_metadata(cu_seqlens, spans, [Fraction(1, 3)], "start", None)
    tokens = int(metadata[4])
    x = torch.arange(460)
    outputs = boundary_step(
        x, None, None, 0.0, [], None, None, cu_seqlens, spans, [1, 3], "start", 0, tokens + 3
    )
    rows = reference.source_rows(FakeStage(metadata[2], tokens, 460))
    assert outputs[0].tolist() == [*rows, 0, 0, 0]
