"""The ops that move rows, composed of torch's own: what `torch.func` and forward-mode AD see.

Their transforms know torch's ops and don't know ours. So under them an op is a gather of rows that
are computed here, in closed form and without a wait. By the ops' names, of the schemas' arguments.
"""

import torch
from torch import Tensor

from adsc_kernels.ops._dispatch import choose


def downsample(
    x: Tensor, segments: Tensor | None, keep_indices: Tensor | None, num_tokens: int
) -> Tensor:
    return downsample_many([x], segments, keep_indices, num_tokens)[0]


def downsample_many(
    xs: list[Tensor], segments: Tensor | None, keep_indices: Tensor | None, num_tokens: int
) -> list[Tensor]:
    rows, used = _source_rows(segments, keep_indices, num_tokens)
    return [_gather(x, rows, used) for x in xs]


def upsample_grad(
    grad: Tensor, segments: Tensor | None, keep_indices: Tensor | None, num_rows: int
) -> Tensor:
    rows, used = _source_rows(segments, keep_indices, grad.shape[0])
    zeros = grad.new_zeros((num_rows, *grad.shape[1:]))
    return zeros.index_add(0, rows, _masked(grad, used))


def downsample_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    segments: Tensor | None,
    keep_indices: Tensor | None,
    num_tokens: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    rows, used = _source_rows(segments, keep_indices, num_tokens)
    total = x.index_select(0, rows) + residual.index_select(0, rows)
    wide = total.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = (wide * scale * weight.to(wide.dtype)).to(x.dtype)
    return _masked(normed, used), _masked(total, used)


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
    metadata: tuple[Tensor, ...] = ()
    if cu_seqlens is not None:
        op = choose("rebuild_metadata", cu_seqlens.device)
        metadata = op(cu_seqlens, spans, keep, pattern, max_height)
        segments = metadata[2]
    rows = (segments, keep_indices, num_tokens)
    if residual is None or weight is None:
        return [*downsample_many([hidden, *others], *rows), *metadata]
    first = downsample_add_rms_norm(hidden, residual, weight, *rows, eps)
    return [*first, *downsample_many(others, *rows), *metadata]


def _gather(x: Tensor, rows: Tensor, used: Tensor | None) -> Tensor:
    return _masked(x.index_select(0, rows), used)


def _masked(x: Tensor, used: Tensor | None) -> Tensor:
    """x, with zeros in the rows that no segment fills."""
    if used is None:
        return x
    return torch.where(used.view(-1, *(1,) * (x.dim() - 1)), x, x.new_zeros(()))


def _source_rows(
    segments: Tensor | None, keep_indices: Tensor | None, num_tokens: int
) -> tuple[Tensor, Tensor | None]:
    """csrc/segment.h's source_row of every output row, and which rows there are (None: all)."""
    if segments is None:
        assert keep_indices is not None
        return keep_indices, None
    row = torch.arange(num_tokens, device=segments.device)
    table = segments.long()
    own = torch.searchsorted(table[:, 0].contiguous(), row, right=True) - 1
    dst, src, span, keep, first, pattern = table.index_select(0, own).unbind(1)
    j, kept = first + row - dst, keep.clamp_min(1)
    index = torch.where(pattern == 1, (2 * j + 1) * span // (2 * kept), j * span // kept)
    gaps = (kept - 1).clamp_min(1)
    linspace = torch.where(keep == 1, 0, (2 * j * (span - 1) + gaps) // (2 * gaps))
    used = j < keep
    return torch.where(used, src + torch.where(pattern == 2, linspace, index), 0), used
