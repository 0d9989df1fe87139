"""The oracle of the ops on the rows of a batch."""

from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from adsc_kernels.reference.rule import kept_count, kept_index, source_rows
from adsc_kernels.segment_table import PATTERN_CODES


def downsample(
    x: Tensor, segments: Tensor | None, keep_indices: Tensor | None, num_tokens: int
) -> Tensor:
    """The rows that stay."""
    return downsample_many([x], segments, keep_indices, num_tokens)[0]


def downsample_many(
    xs: list[Tensor], segments: Tensor | None, keep_indices: Tensor | None, num_tokens: int
) -> list[Tensor]:
    """The rows that stay, of each tensor."""
    rows = source_rows(segments, keep_indices, num_tokens)
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


def upsample_grad(
    grad: Tensor, segments: Tensor | None, keep_indices: Tensor | None, num_rows: int
) -> Tensor:
    """Each row in its place of num_rows, summed where it was taken more than once; 0 elsewhere."""
    x_grad = grad.new_zeros((num_rows, *grad.shape[1:]))
    for i, row in enumerate(source_rows(segments, keep_indices, grad.shape[0])):
        x_grad[row] += grad[i]
    return x_grad


def downsample_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    segments: Tensor | None,
    keep_indices: Tensor | None,
    num_tokens: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and x + residual, of the rows that stay."""
    x, residual = downsample_many([x, residual], segments, keep_indices, num_tokens)
    residual_out = x + residual
    wide = residual_out.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype), residual_out


def rebuild_metadata(
    cu_seqlens: Tensor,
    spans: Tensor,
    keep: list[int],
    pattern: str,
    max_height: int,
) -> tuple[Tensor, ...]:
    """keep: numerator and denominator of the span's fraction, or of those of rows and columns."""
    fractions = [Fraction(*pair) for pair in zip(keep[::2], keep[1::2], strict=True)]
    bounds = cu_seqlens.tolist()
    blocks = kept_count(max_height, fractions[0]) if pattern == "grid" else 1
    new_bounds, new_spans, table = [0], [], []
    rows = 0

    def emit(src: int, span: int, kept: int, number: int) -> None:
        nonlocal rows
        table.append([rows, src, span, kept, 0, number])
        rows += kept

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


def boundary_step(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    others: list[Tensor],
    segments: Tensor | None,
    keep_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    spans: Tensor | None,
    keep: list[int],
    pattern: str,
    max_height: int,
    num_tokens: int,
) -> list[Tensor]:
    """The new hidden, residual, others and metadata, in a row; None isn't among them."""
    metadata: tuple[Tensor, ...] = ()
    rows = num_tokens
    if cu_seqlens is not None and spans is not None:
        metadata = rebuild_metadata(cu_seqlens, spans, keep, pattern, max_height)
        segments, rows = metadata[2], int(metadata[4])
        if rows > num_tokens:
            raise ValueError(
                f"num_tokens: expected at least the rows of the stage, {rows}, got {num_tokens}"
            )
    moved = downsample_many([hidden, *others], segments, keep_indices, rows)
    if residual is not None and weight is not None:
        moved[:1] = downsample_add_rms_norm(
            hidden, residual, weight, segments, keep_indices, rows, eps
        )
    unused = num_tokens - rows
    if unused:
        moved = [torch.cat([x, x.new_zeros(unused, *x.shape[1:])]) for x in moved]
    return [*moved, *metadata]
