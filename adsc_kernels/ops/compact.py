"""Shrinking a KV cache that is already written: `compact_kv_` and `compact_paged_kv_`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adsc_kernels import reference
from adsc_kernels.backend import CHECK
from adsc_kernels.compaction import CompactionResult, Ints, Pages, check_pages
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.ops._cache import (
    Caches,
    CacheStage,
    IntsLike,
    axis,
    check_caches,
    check_ints,
    check_rows_of,
)
from adsc_kernels.ops._dispatch import check_table, choose, register

Blocks = Sequence[int] | Tensor | np.ndarray


@dataclass(frozen=True)
class CompactionCall:
    """The arguments of one of the two ops, checked, and what the host knows of its results."""

    arguments: tuple[Any, ...]
    caches: Caches
    new_lens: tuple[int, ...]
    paged: bool
    block_table: Tensor | None = None  # where the op makes no new one
    pages: Pages | None = None

    @property
    def device(self) -> torch.device:
        return self.caches.tensors[0].device

    def result(
        self,
        lens: Tensor,
        slots: Tensor,
        last_page_len: Tensor | None = None,
        indptr: Tensor | None = None,
        new_table: Tensor | None = None,
    ) -> CompactionResult:
        """lens and on: what the op returned."""
        return CompactionResult(
            Ints(self.new_lens, lens),
            slots,
            new_table if self.block_table is None else self.block_table,
            last_page_len,
            indptr,
            None if self.pages is None else self.pages.released,
            None if self.pages is None else self.pages.free,
        )


def compact_kv_(
    k_caches: Tensor | Sequence[Tensor],
    v_caches: Tensor | Sequence[Tensor] | None,
    stage: CacheStage | None = None,
    seq_starts: IntsLike | None = None,
    *,
    layout: str = "NHD",
    keep_indices: Tensor | None = None,
    cu_kept: IntsLike | None = None,
    cu_rows: IntsLike | None = None,
    prefix_lens: IntsLike | None = None,
    seq_lens: IntsLike | None = None,
    k_scales: Tensor | Sequence[Tensor] | None = None,
    v_scales: Tensor | Sequence[Tensor] | None = None,
) -> CompactionResult:
    """Moves the rows that stay to the front of each sequence's cache, in place, in all layers.

    A sequence's cached rows are `prefix | rows to choose from | suffix`. Prefix and suffix stay
    whole (the suffix moves up behind the rows that are kept, in the same pass); of the middle, the
    rows stay that stage or keep_indices names. Rows that lie right already aren't touched, nor is
    anything behind a sequence's new end: what is left there is stale.

    k_caches: a tensor, or one for each layer: packed [T, H, D], sequences one after another, each
      with room of its own; or [B, S, H, D], sequence b in batch row b. With layout "HND" [H, T, D]
      and [B, H, S, D]. Any dtype, any strides with unit stride on D.
    v_caches: as many, of the same dtype and device and the same T, or B and S; heads and D may
      differ. None where one tensor holds K and V, or for a latent cache.
    stage: the mapping of the rows to choose from, such as `plan.between(0, s)` for the layers
      before the first boundary; anything with `.segments`, `.num_tokens`, `.num_tokens_in`,
      `.cu_seqlens`, `.cu_seqlens_in`, `.seq_lens`, `.seq_lens_in`, `.cached_lens` and
      `.source_rows()`.
    seq_starts: for packed caches, B + 1 boundaries: sequence b owns rows seq_starts[b] up to
      seq_starts[b + 1]. None: with a stage, its own rows, one sequence right behind the other.
      For batched caches None.
    keep_indices: in place of stage, int32 or int64, the rows that stay, counted from the first row
      to choose from and rising within each sequence. [rows], sequences one after another; or
      [heads, rows] or [layers or 1, heads or 1, rows] for a choice by head or layer (K and V must
      then have as many heads).
    cu_kept: with keep_indices, B + 1 boundaries of each sequence's own in it.
    cu_rows: with keep_indices, B + 1 boundaries of the rows to choose from, of which only the
      differences count. None: all that is cached behind the prefix.
    prefix_lens: B lengths; None: no prefix. With a plan of chunks it must be given.
    seq_lens: B lengths, everything cached. None: with a stage, prefix and rows to choose from; with
      keep_indices it must be given.
    k_scales, v_scales: one for each layer, moved along: [T, H], [B, S, H] (HND: [H, T],
      [B, H, S]), also with a last dimension of groups, or for all heads together [T], [B, S].

    Wherever lengths or boundaries are taken: ints, uploaded in the call without synchronisation, or
    `Ints(host, device)`, used as they are. While a CUDA graph is captured only the latter.

    Returns `CompactionResult` with seq_lens and slot_mapping.

    Nothing is written if it raises: TypeError, ValueError or UnsupportedError, naming the argument.
    Before the launch the host checks types, shapes, strides, devices, all lengths against one
    another and against the room, and that no two caches share memory (that not under
    torch.compile). The contents of keep_indices and of segments are checked if they are on the CPU;
    on a device with ADSC_CHECK=1, where the kernel traps before its first write.
    """
    call = check_dense(
        k_caches,
        v_caches,
        stage,
        seq_starts,
        layout=layout,
        keep_indices=keep_indices,
        cu_kept=cu_kept,
        cu_rows=cu_rows,
        prefix_lens=prefix_lens,
        seq_lens=seq_lens,
        k_scales=k_scales,
        v_scales=v_scales,
    )
    op = choose("compact_kv_", call.device) or reference.compact_kv_
    return call.result(*op(*call.arguments))


def check_dense(
    k_caches: Tensor | Sequence[Tensor],
    v_caches: Tensor | Sequence[Tensor] | None,
    stage: CacheStage | None,
    seq_starts: IntsLike | None,
    *,
    layout: str,
    keep_indices: Tensor | None,
    cu_kept: IntsLike | None,
    cu_rows: IntsLike | None,
    prefix_lens: IntsLike | None,
    seq_lens: IntsLike | None,
    k_scales: Tensor | Sequence[Tensor] | None,
    v_scales: Tensor | Sequence[Tensor] | None,
) -> CompactionCall:
    """The arguments of `compact_kv_`. Raises as it does."""
    caches = check_caches(k_caches, v_caches, k_scales, v_scales, layout)
    rows = check_rows_of(
        caches, stage, keep_indices, cu_kept, cu_rows, prefix_lens, seq_lens, False
    )
    first = caches.tensors[0]
    starts: Tensor | None = None
    if first.dim() == 4:
        if seq_starts is not None:
            raise ValueError(f"seq_starts: expected None for batched caches, got {seq_starts}")
        if rows.batch != caches.blocks:
            raise ValueError(
                f"k_caches[0]: expected {rows.batch} sequences, got shape {tuple(first.shape)} "
                f"in layout {layout}"
            )
        room = (caches.tokens,) * rows.batch
    elif seq_starts is not None:
        checked = check_ints(seq_starts, "seq_starts", rows.batch + 1, first)
        bounds, starts = checked.host, checked.device
        if any(b < a for a, b in pairwise(bounds)) or bounds[-1] > caches.tokens:
            raise ValueError(
                f"seq_starts: expected rising boundaries of at most {caches.tokens}, got {bounds}"
            )
        room = tuple(b - a for a, b in pairwise(bounds))
    elif stage is not None:
        starts, room = stage.cu_seqlens_in, stage.seq_lens_in
        if stage.num_tokens_in > caches.tokens:
            raise ValueError(
                f"k_caches[0]: expected at least {stage.num_tokens_in} tokens "
                f"(stage.num_tokens_in), got {caches.tokens}"
            )
    else:
        raise ValueError("seq_starts: expected it for packed caches with keep_indices, got None")
    for b, (length, space) in enumerate(zip(rows.host.seq_lens, room, strict=True)):
        if length > space:
            raise ValueError(
                f"seq_lens: expected at most {space} rows, the room of sequence {b}, got {length}"
            )
    arguments = (
        caches.tensors,
        caches.num_layers,
        rows.segments,
        rows.keep_indices,
        rows.cu_kept,
        rows.cu_rows,
        rows.prefix_lens,
        rows.seq_lens,
        starts,
        layout,
    )
    return CompactionCall(arguments, caches, rows.host.new_lens, paged=False)


def compact_paged_kv_(
    k_caches: Tensor | Sequence[Tensor],
    v_caches: Tensor | Sequence[Tensor] | None,
    block_table: Tensor,
    stage: CacheStage | None = None,
    block_size: int | None = None,
    *,
    layout: str = "NHD",
    keep_indices: Tensor | None = None,
    cu_kept: IntsLike | None = None,
    cu_rows: IntsLike | None = None,
    prefix_lens: IntsLike | None = None,
    seq_lens: IntsLike | None = None,
    edit_table: bool = False,
    block_table_host: Tensor | np.ndarray | None = None,
    pinned: Blocks | None = None,
    k_scales: Tensor | Sequence[Tensor] | None = None,
    v_scales: Tensor | Sequence[Tensor] | None = None,
) -> CompactionResult:
    """`compact_kv_` of a paged cache: row r of sequence b lies at place r % block_size of block
    block_table[b, r // block_size].

    k_caches: a tensor, or one for each layer: blocks [N, block_size, H, D], or with layout "HND"
      [N, H, block_size, D]; views of any strides with unit stride on D, so that any engine's pool
      fits. Or slots [N * block_size, H, D] (HND: [H, N * block_size, D]) and a block_size.
    v_caches, stage, keep_indices, cu_kept, cu_rows, prefix_lens, seq_lens: as for `compact_kv_`.
    block_table: int32 or int64 [B, max_blocks] on the device of the caches, any distance between
      rows. Entries behind a sequence's last block aren't read.
    block_size: None: that of the blocks.
    edit_table: False: the table stays as it is, and rows move to the front of each sequence's
      blocks. True: each page of the new cache takes the block of its last row if that lies right
      in it, else that of its first row; rows that lie right in that block don't move, and the
      result holds the new table. So where what is dropped in front of the suffix is a multiple of
      block_size, no row of the suffix moves, nor, with block_size 1, any row. Needs the same rows
      for all heads and layers.
    block_table_host: a copy of block_table in host memory, any integer type; on CPU the table
      itself serves.
    pinned: blocks that must not be written: shared through a prefix cache, or to be copied on
      write. Rows in them may stay, or be read on their way into another block. In host memory; or,
      where the table is on a device alone, there, contiguous int32 or int64.
    k_scales, v_scales: one for each layer, moved along: [N, block_size, H] (HND:
      [N, H, block_size]), also with a last dimension of groups, or for all heads together
      [N, block_size]; with slots [N * block_size, H] and so on.

    Returns `CompactionResult`, all of it.

    Errors as `compact_kv_`. What a table holds (a block outside the pool, one that two sequences or
    two pages share and that isn't pinned, a pinned block that a move would write) is checked

    - on the host, without synchronisation, where the table or block_table_host is in host memory:
      ValueError. If keep_indices are on a device, or differ by head or layer, the host can't know
      which rows move, and takes every block behind the prefix for written. (Under torch.compile
      the host looks at no contents; the CPU op still does, itself.)
    - on a device with ADSC_CHECK=1, by launches in front of the one that moves: they trap, with
      the message in what the process prints. They know which rows move.
    - on a device also without ADSC_CHECK where pinned is given and the host has seen no table, in
      the same way, so that no pinned block is ever written. A trap ends all work of the process
      on that device; where moves into pinned blocks may be asked for, give block_table_host.

    A table on a device alone, without pinned and without ADSC_CHECK, is taken as it is.
    """
    call = check_paged(
        k_caches,
        v_caches,
        block_table,
        stage,
        block_size,
        layout=layout,
        keep_indices=keep_indices,
        cu_kept=cu_kept,
        cu_rows=cu_rows,
        prefix_lens=prefix_lens,
        seq_lens=seq_lens,
        edit_table=edit_table,
        block_table_host=block_table_host,
        pinned=pinned,
        k_scales=k_scales,
        v_scales=v_scales,
    )
    op = choose("compact_paged_kv_", call.device) or reference.compact_paged_kv_
    return call.result(*op(*call.arguments))


def check_paged(
    k_caches: Tensor | Sequence[Tensor],
    v_caches: Tensor | Sequence[Tensor] | None,
    block_table: Tensor,
    stage: CacheStage | None,
    block_size: int | None,
    *,
    layout: str,
    keep_indices: Tensor | None,
    cu_kept: IntsLike | None,
    cu_rows: IntsLike | None,
    prefix_lens: IntsLike | None,
    seq_lens: IntsLike | None,
    edit_table: bool,
    block_table_host: Tensor | np.ndarray | None,
    pinned: Blocks | None,
    k_scales: Tensor | Sequence[Tensor] | None,
    v_scales: Tensor | Sequence[Tensor] | None,
) -> CompactionCall:
    """The arguments of `compact_paged_kv_`. Raises as it does."""
    caches = check_caches(k_caches, v_caches, k_scales, v_scales, layout)
    first = caches.tensors[0]
    size, num_blocks = _block_size(caches, block_size, layout)
    with_sources = edit_table or pinned is not None
    rows = check_rows_of(
        caches, stage, keep_indices, cu_kept, cu_rows, prefix_lens, seq_lens, with_sources
    )
    if not isinstance(block_table, Tensor):
        raise TypeError(f"block_table: expected a torch.Tensor, got {type(block_table).__name__}")
    if block_table.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"block_table: expected torch.int32 or torch.int64, got {block_table.dtype}"
        )
    if block_table.device != first.device:
        raise ValueError(
            f"block_table: expected the device of k_caches[0], {first.device}, "
            f"got {block_table.device}"
        )
    _check_table_shape(block_table, "block_table", rows.batch)
    if block_table.numel() > 1 and block_table.shape[1] > 1 and block_table.stride(1) != 1:
        raise ValueError(
            "block_table: expected unit stride within a row, got strides "
            f"{tuple(block_table.stride())}"
        )
    for b, length in enumerate(rows.host.seq_lens):
        if length > block_table.shape[1] * size:
            raise ValueError(
                f"seq_lens: expected at most {block_table.shape[1]} blocks of {size} rows for "
                f"sequence {b}, got {length} rows"
            )
    if edit_table and rows.keep_indices is not None and rows.keep_indices.shape[:2] != (1, 1):
        raise UnsupportedError(
            "edit_table: one table can't serve heads or layers that keep different rows, got "
            f"keep_indices of shape {tuple(rows.keep_indices.shape)}"
        )
    pages = None
    table = _host_table(block_table, block_table_host, rows.batch)
    if table is not None:
        pages = check_pages(
            table,
            rows.host,
            size,
            num_blocks,
            edit_table,
            _host_blocks(pinned),
            "block_table" if block_table_host is None else "block_table_host",
        )
        if first.device.type == "cuda" and not CHECK:
            pinned = None  # nothing is left to check
    arguments = (
        caches.tensors,
        caches.num_layers,
        block_table,
        size,
        rows.segments,
        rows.keep_indices,
        rows.cu_kept,
        rows.cu_rows,
        rows.prefix_lens,
        rows.seq_lens,
        edit_table,
        None if pinned is None else _op_blocks(pinned, first),
        layout,
    )
    return CompactionCall(
        arguments,
        caches,
        rows.host.new_lens,
        paged=True,
        block_table=None if edit_table else block_table,
        pages=pages,
    )


def _block_size(caches: Caches, block_size: int | None, layout: str) -> tuple[int, int]:
    """Rows of a block, and blocks of the pool."""
    first = caches.tensors[0]
    if block_size is not None and (not isinstance(block_size, int) or block_size < 1):
        raise ValueError(f"block_size: expected an int of at least 1, got {block_size!r}")
    if first.dim() == 4:
        if block_size not in (None, caches.tokens):
            raise ValueError(
                f"block_size: expected {caches.tokens}, dimension {axis(4, layout, 'token')} of "
                f"k_caches[0] in layout {layout}, got {block_size} for shape {tuple(first.shape)}"
            )
        return caches.tokens, caches.blocks
    if block_size is None:
        raise ValueError("block_size: expected it for caches of slots, got None")
    if caches.tokens % block_size:
        raise ValueError(
            f"block_size: expected a divisor of the {caches.tokens} slots, got {block_size}"
        )
    return block_size, caches.tokens // block_size


def _check_table_shape(table: Tensor | np.ndarray, name: str, batch: int) -> None:
    if table.ndim != 2 or table.shape[0] != batch:
        raise ValueError(f"{name}: expected shape [{batch}, max_blocks], got {tuple(table.shape)}")


def _host_table(
    block_table: Tensor, host: Tensor | np.ndarray | None, batch: int
) -> np.ndarray | None:
    if host is None:
        if block_table.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        return block_table.numpy()
    if isinstance(host, Tensor):
        if host.device.type != "cpu":
            raise ValueError(
                f"block_table_host: expected a table in host memory, got one on {host.device}"
            )
        if torch.compiler.is_compiling():
            return None
        host = host.numpy()
    if not isinstance(host, np.ndarray) or host.dtype.kind not in "iu":
        raise TypeError(
            "block_table_host: expected a CPU tensor or an array of integers, got "
            f"{getattr(host, 'dtype', type(host).__name__)}"
        )
    _check_table_shape(host, "block_table_host", batch)
    if host.shape[1] < block_table.shape[1]:
        raise ValueError(
            f"block_table_host: expected {block_table.shape[1]} blocks a row, as in block_table, "
            f"got {host.shape[1]}"
        )
    return host


def _host_blocks(pinned: Blocks | None) -> np.ndarray:
    if isinstance(pinned, Tensor) and pinned.device.type != "cpu":
        raise ValueError(
            f"pinned: expected blocks in host memory, as the table, got them on {pinned.device}"
        )
    blocks = np.asarray([] if pinned is None else pinned)
    if blocks.size and blocks.dtype.kind not in "iu":
        raise TypeError(f"pinned: expected integers, got {blocks.dtype}")
    return blocks.astype(np.int64).ravel()


def _op_blocks(pinned: Blocks, like: Tensor) -> Tensor:
    """pinned as the op takes it: where the caches are."""
    if isinstance(pinned, Tensor) and pinned.device.type != "cpu":
        check_table(pinned, "pinned", (torch.int32, torch.int64), like, "k_caches[0]")
        return pinned.view(-1)
    if torch.compiler.is_compiling():
        return torch.as_tensor(pinned, dtype=torch.int64, device=like.device).view(-1)
    blocks = torch.from_numpy(_host_blocks(pinned))
    if like.device.type != "cuda":
        return blocks
    if torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"pinned: expected blocks on {like.device} while a graph is captured, since no graph "
            "keeps what an upload reads, got them in host memory"
        )
    return blocks.pin_memory().to(like.device, non_blocking=True)


# ---- Schemas and shapes for tracing ----


def _fake(
    caches: list[Tensor],
    num_layers: int,
    segments: Tensor | None,
    keep_indices: Tensor | None,
    cu_kept: Tensor,
    cu_rows: Tensor | None,
    prefix_lens: Tensor | None,
    seq_lens: Tensor | None,
    seq_starts: Tensor | None,
    layout: str,
) -> tuple[Tensor, Tensor]:
    batch = cu_kept.shape[0] - 1
    return (
        cu_kept.new_empty(batch, dtype=torch.int32),
        cu_kept.new_empty(batch, dtype=torch.int64),
    )


def _fake_paged(
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
    pinned: Tensor | None,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch = cu_kept.shape[0] - 1
    return (
        cu_kept.new_empty(batch, dtype=torch.int32),
        cu_kept.new_empty(batch, dtype=torch.int64),
        cu_kept.new_empty(batch, dtype=torch.int32),
        cu_kept.new_empty(batch + 1, dtype=torch.int32),
        block_table.new_empty(block_table.shape if edit_table else (0, 0)),
    )


_ROWS = (
    "Tensor? segments, Tensor? keep_indices, Tensor cu_kept, Tensor? cu_rows, "
    "Tensor? prefix_lens, Tensor? seq_lens"
)
register(
    "compact_kv_",
    f"(Tensor(a!)[] caches, int num_layers, {_ROWS}, Tensor? seq_starts, str cache_layout) "
    "-> (Tensor, Tensor)",
    fake=_fake,
    triton="compact",
)
register(
    "compact_paged_kv_",
    "(Tensor(a!)[] caches, int num_layers, Tensor block_table, SymInt block_size, "
    f"{_ROWS}, bool edit_table, Tensor? read_only_blocks, str cache_layout) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_paged,
    triton="compact",
)
