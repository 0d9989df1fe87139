"""What each op returns, uninitialized, from its schema's arguments: shapes depend on shapes alone.

For tracing, and for whoever runs an op to write into. One function for each op, by its name.
"""

import torch
from torch import Tensor

from adsc_kernels import segment_table


def downsample(
    x: Tensor, segments: Tensor | None, keep_indices: Tensor | None, num_tokens: int
) -> Tensor:
    return x.new_empty((num_tokens, *x.shape[1:]))


def downsample_many(
    xs: list[Tensor], segments: Tensor | None, keep_indices: Tensor | None, num_tokens: int
) -> list[Tensor]:
    return [downsample(x, segments, keep_indices, num_tokens) for x in xs]


def upsample_grad(
    grad: Tensor, segments: Tensor | None, keep_indices: Tensor | None, num_rows: int
) -> Tensor:
    return grad.new_empty((num_rows, *grad.shape[1:]))


def downsample_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    segments: Tensor | None,
    keep_indices: Tensor | None,
    num_tokens: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    shape = (num_tokens, x.shape[1])
    return x.new_empty(shape), x.new_empty(shape)


def rebuild_metadata(
    cu_seqlens: Tensor, spans: Tensor, keep: list[int], pattern: str, max_height: int
) -> tuple[Tensor, ...]:
    num_sequences, num_spans = cu_seqlens.shape[0] - 1, spans.shape[0]
    grid = pattern == "grid"
    blocks = -((-max_height * keep[0]) // keep[1]) if grid else 1
    shapes = (
        (num_sequences + 1,),
        (num_spans, 5 if grid else 3),
        (num_sequences + num_spans * (1 + blocks), len(segment_table.COLUMNS)),
        (num_sequences,),
        (),
        (),
    )
    return tuple(cu_seqlens.new_empty(shape) for shape in shapes)


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
    moved = [hidden, *([] if residual is None else [residual]), *others]
    outputs = [x.new_empty((num_tokens, *x.shape[1:])) for x in moved]
    if cu_seqlens is not None and spans is not None:
        outputs += rebuild_metadata(cu_seqlens, spans, keep, pattern, max_height)
    return outputs


def compact_kv_(
    caches: list[Tensor],
    num_layers: int,
    segments: Tensor | None,
    keep_indices: Tensor | None,
    cu_kept: Tensor,
    cu_rows: Tensor | None,
    prefix_lens: Tensor | None,
    seq_lens: Tensor | None,
    seq_starts: Tensor | None,
    cache_layout: str,
) -> tuple[Tensor, Tensor]:
    batch = cu_kept.shape[0] - 1
    return (
        cu_kept.new_empty(batch, dtype=torch.int32),
        cu_kept.new_empty(batch, dtype=torch.int64),
    )


def compact_paged_kv_(
    caches: list[Tensor],
    num_layers: int,
    block_table: Tensor,
    block_size: int,
    segments: Tensor | None,
    keep_indices: Tensor | None,
    cu_kept: Tensor,
    cu_rows: Tensor | None,
    prefix_lens: Tensor | None,
    seq_lens: Tensor | None,
    edit_table: bool,
    read_only_blocks: Tensor | None,
    cache_layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch = cu_kept.shape[0] - 1
    return (
        cu_kept.new_empty(batch, dtype=torch.int32),
        cu_kept.new_empty(batch, dtype=torch.int64),
        cu_kept.new_empty(batch, dtype=torch.int32),
        cu_kept.new_empty(batch + 1, dtype=torch.int32),
        block_table.new_empty(block_table.shape if edit_table else (0, 0)),
    )


def compress_step(*arguments) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    """arguments: the 13 of boundary_step, those of the two compaction ops, and outs.

    Always five tensors; of a dense cache the last three have no elements.
    """
    caches, num_layers, *paged, seq_starts, edit_table, blocks, cache_layout = arguments[13:-1]
    block_table, _, *rows = paged
    if block_table is not None:
        given = (caches, num_layers, *paged, edit_table, blocks, cache_layout)
        return compact_paged_kv_(*given)
    given = (caches, num_layers, *rows, seq_starts, cache_layout)
    none = (caches[0].new_empty(0, dtype=torch.int32) for _ in range(3))
    return (*compact_kv_(*given), *none)
