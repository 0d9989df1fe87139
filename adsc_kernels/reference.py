"""The oracle: every op as a plain loop, on any device, written to be read.

Slow, and free to look at tensors' contents, which the kernels may not.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adsc_kernels.segment_table import PATTERN_CODES

if TYPE_CHECKING:
    from adsc_kernels.ops._dispatch import Stage
    from adsc_kernels.ops.boundary import Layout
    from adsc_kernels.ops.compact import CompactionCall

PATTERNS = tuple(name for name in PATTERN_CODES if name != "grid")  # by code


def kept_count(n: int, keep: Fraction) -> int:
    """How many of n rows stay: n * keep, rounded up."""
    return -((-n * keep.numerator) // keep.denominator)


def aligned_kept_count(n: int, kept: int, block: int) -> int:
    """The least count from `kept` up that leaves a multiple of `block` of n rows to drop."""
    while (n - kept) % block:
        kept += 1
    return kept


def kept_index(pattern: str, j: int, n: int, m: int) -> int:
    """The index, in [0, n), of number j of the m rows that stay."""
    if pattern == "start":
        return (j * n) // m
    if pattern == "center":
        return ((2 * j + 1) * n) // (2 * m)
    if m == 1:
        return 0
    return (2 * j * (n - 1) + (m - 1)) // (2 * (m - 1))  # round_half_up(j * (n - 1) / (m - 1))


def kept_before(pattern: str, x: int, n: int, m: int) -> int:
    """How many of the m rows that stay lie below index x."""
    return sum(kept_index(pattern, j, n, m) < x for j in range(m))


def source_rows(stage: "Stage | None", keep_indices: Tensor | None = None) -> list[int]:
    """The source row of every output row.

    Raises ValueError where the table does not say it for every output row.
    """
    if stage is None:
        assert keep_indices is not None
        return keep_indices.tolist()
    table = stage.segments.tolist()
    ends = [row[0] for row in table[1:]] + [stage.num_tokens]
    rows: list[int] = []
    for (dst, src, span, keep, first, pattern), end in zip(table, ends, strict=False):
        if dst != len(rows):
            raise ValueError(f"segments: expected dst {len(rows)} next, got {dst}")
        for j in range(first, first + end - dst):
            if not 0 <= j < keep <= span:
                raise ValueError(f"segments: kept row {j} of {keep} of a span of {span}")
            rows.append(src + kept_index(PATTERNS[pattern], j, span, keep))
    if len(rows) != stage.num_tokens:
        raise ValueError(f"segments: expected {stage.num_tokens} output rows, got {len(rows)}")
    return rows


def downsample(
    x: Tensor, stage: "Stage | None" = None, *, keep_indices: Tensor | None = None
) -> Tensor:
    """See `adsc_kernels.ops.downsample`."""
    return downsample_many([x], stage, keep_indices=keep_indices)[0]


def downsample_many(
    xs: Sequence[Tensor], stage: "Stage | None" = None, *, keep_indices: Tensor | None = None
) -> list[Tensor]:
    """See `adsc_kernels.ops.downsample_many`."""
    rows = source_rows(stage, keep_indices)
    for row in rows:
        if not 0 <= row < xs[0].shape[0]:
            raise ValueError(f"source rows: expected them in [0, {xs[0].shape[0]}), got {row}")
    outs = []
    for x in xs:
        out = x.new_empty((len(rows), *x.shape[1:]))
        for i, row in enumerate(rows):
            out[i] = x[row]
        outs.append(out)
    return outs


def downsample_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    stage: "Stage | None" = None,
    eps: float = 1e-6,
    *,
    keep_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `adsc_kernels.ops.downsample_add_rms_norm`."""
    x, residual = downsample_many([x, residual], stage, keep_indices=keep_indices)
    residual_out = x + residual
    wide = residual_out.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype), residual_out


def rebuild_metadata(
    cu_seqlens: Tensor,
    spans: Tensor,
    fractions: Sequence[Fraction],
    pattern: str,
    max_height: int | None,
) -> tuple[Tensor, ...]:
    """See `adsc_kernels.ops.rebuild_metadata`.

    fractions: that of the span, or those of the grid's rows and columns.
    """
    bounds = cu_seqlens.tolist()
    blocks = 1 if max_height is None else kept_count(max_height, fractions[0])
    new_bounds, new_spans, table = [0], [], []
    rows = 0

    def emit(src: int, span: int, keep: int, number: int) -> None:
        nonlocal rows
        table.append([rows, src, span, keep, 0, number])
        rows += keep

    for sequence, (source, end) in enumerate(pairwise(bounds)):
        begin, first = rows, source
        for owner, start, length, *size in spans.tolist():
            if owner != sequence:
                continue
            text = first + start - source
            emit(source, text, text, 0)
            new_start = rows - begin
            if pattern == "grid":
                height, width = size
                kept_rows = kept_count(height, fractions[0])
                kept_cols = kept_count(width, fractions[1])
                for r in range(kept_rows):
                    row = kept_index("start", r, height, kept_rows)
                    emit(first + start + row * width, width, kept_cols, 0)
                for _ in range(blocks - kept_rows):
                    emit(first + start + length, 0, 0, 0)
                new_spans.append([sequence, new_start, kept_rows * kept_cols, kept_rows, kept_cols])
            else:
                kept = kept_count(length, fractions[0])
                emit(first + start, length, kept, PATTERN_CODES[pattern])
                new_spans.append([sequence, new_start, kept])
            source = first + start + length
        emit(source, end - source, end - source, 0)
        new_bounds.append(rows)

    lengths = [b - a for a, b in pairwise(new_bounds)]

    def tensor(values: object, *shape: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=cu_seqlens.device).reshape(shape)

    return (
        tensor(new_bounds, len(bounds)),
        tensor(new_spans, len(new_spans), 5 if pattern == "grid" else 3),
        tensor(table, len(table), 6),
        tensor(lengths, len(lengths)),
        tensor(rows),
        tensor(max(lengths, default=0)),
    )


# That file needs source_rows from this one.
from adsc_kernels.reference_kv import compact_kv_ as compact_kv_  # noqa: E402
from adsc_kernels.reference_kv import compact_paged_kv_ as compact_paged_kv_  # noqa: E402


def boundary_step(
    hidden: Tensor,
    stage: "Stage | None" = None,
    *,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    others: Sequence[Tensor] = (),
    keep_indices: Tensor | None = None,
    layout: "Layout | None" = None,
) -> tuple[Tensor, Tensor | None, list[Tensor], tuple[Tensor, ...] | None]:
    """See `adsc_kernels.ops.boundary_step`."""
    metadata, unused = None, 0
    if layout is not None:
        from adsc_kernels.ops.metadata import MetadataStage

        fractions = layout.fractions()
        metadata = rebuild_metadata(
            layout.cu_seqlens, layout.spans, fractions, layout.pattern, layout.max_height
        )
        rows = int(metadata[4])
        if rows > layout.num_tokens:
            raise ValueError(
                f"num_tokens: expected at least the rows of the stage, {rows}, "
                f"got {layout.num_tokens}"
            )
        stage = MetadataStage(metadata[2], rows, hidden.shape[0])
        unused = layout.num_tokens - rows

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(unused, *x.shape[1:])]) if unused else x

    moved = downsample_many([hidden, *others], stage, keep_indices=keep_indices)
    new_hidden, new_residual = moved[0], None
    if residual is not None and weight is not None:
        new_hidden, new_residual = downsample_add_rms_norm(
            hidden, residual, weight, stage, eps, keep_indices=keep_indices
        )
        new_residual = padded(new_residual)
    return padded(new_hidden), new_residual, [padded(x) for x in moved[1:]], metadata


def compress_step(
    hidden: Tensor,
    compaction: "CompactionCall",
    stage: "Stage | None" = None,
    *,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    others: Sequence[Tensor] = (),
    keep_indices: Tensor | None = None,
    layout: "Layout | None" = None,
) -> tuple[
    tuple[Tensor, Tensor | None, list[Tensor], tuple[Tensor, ...] | None], tuple[Tensor, ...]
]:
    """See `adsc_kernels.ops.compress_step`: `boundary_step`, and one of the compaction ops.

    compaction: its arguments, as that op has checked them.
    """
    step = boundary_step(
        hidden,
        stage,
        residual=residual,
        weight=weight,
        eps=eps,
        others=others,
        keep_indices=keep_indices,
        layout=layout,
    )
    compact = compact_paged_kv_ if compaction.paged else compact_kv_
    return step, compact(*compaction.arguments)
