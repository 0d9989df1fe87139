"""What describes a KV cache and the rows of it that stay: `DenseCache` and `PagedCache`."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from adsc_kernels.kv.kept import KeptCaches
from adsc_kernels.kv.pages import Ints
from adsc_kernels.rows import Stage

Blocks = Sequence[int] | Tensor | np.ndarray
CacheLayout = Literal["NHD", "HND"]
IntsLike = Sequence[int] | Ints
Tensors = Tensor | Sequence[Tensor]


class CacheStage(Stage, Protocol):
    """What compaction needs of a StagePlan: a Stage, and whose rows are whose."""

    @property
    def cu_seqlens(self) -> Tensor: ...  # int32 [B + 1] on the device: rows that stay

    @property
    def cu_seqlens_in(self) -> Tensor: ...  # int32 [B + 1] on the device: rows to choose from

    @property
    def seq_lens(self) -> tuple[int, ...]: ...  # the same as lengths, on the host

    @property
    def seq_lens_in(self) -> tuple[int, ...]: ...

    @property
    def cached_lens(self) -> tuple[int, ...]: ...

    def source_rows(self) -> np.ndarray: ...  # host: the row that each row of the stage takes


@dataclass(frozen=True, eq=False)
class _Cache:
    """What the caches of either kind have in common; the two document it."""

    k_caches: Tensors
    v_caches: Tensors | None
    _: KW_ONLY
    layout: CacheLayout = "NHD"
    keep_indices: Tensor | None = None
    cu_kept: IntsLike | None = None
    cu_rows: IntsLike | None = None
    prefix_lens: IntsLike | None = None
    seq_lens: IntsLike | None = None
    k_scales: Tensors | None = None
    v_scales: Tensors | None = None
    # Of this object and all that `replace` makes of it: empty before the first call, then a list of
    # one. None for tensors that a call names itself.
    _kept: list[KeptCaches | None] | None = field(default_factory=list, repr=False)

    def first(self) -> Any:
        """The tensor that says where the cache lies, as far as anybody has looked at it yet."""
        k = self.k_caches
        return k[0] if (type(k) is list or type(k) is tuple) and k else k

    def forget(self) -> bool:
        """Forgets what is kept of the tensors, if anything is; then a call may be made anew."""
        if self._kept in (None, [], [None]):
            return False
        self._kept[:] = ()
        return True


@dataclass(frozen=True, eq=False)
class DenseCache(_Cache):
    """A cache in which each sequence has room of its own, and which of its rows stay.

    A sequence's cached rows are `prefix | rows to choose from | suffix`. Of the middle, the rows
    stay that stage or keep_indices names; prefix and suffix stay whole. What isn't known when the
    object is made is left None and named in the call.

    k_caches: a tensor, or one for each layer: packed [T, H, D], sequences one after another; or
      [B, S, H, D], sequence b in batch row b. With layout "HND" [H, T, D] and [B, H, S, D]. Any
      dtype, any strides with unit stride on D.
    v_caches: as many, of the same dtype and device and the same T, or B and S; heads and D may
      differ. None where one tensor holds K and V, or for a latent cache.
    stage: the mapping of the rows to choose from, such as `plan.between(0, s)` for the layers
      before the first boundary; anything with `.segments`, `.num_tokens`, `.num_tokens_in`,
      `.cu_seqlens`, `.cu_seqlens_in`, `.seq_lens`, `.seq_lens_in`, `.cached_lens` and
      `.source_rows()`.
    seq_starts: for packed caches, B + 1 boundaries: sequence b owns rows seq_starts[b] up to
      seq_starts[b + 1]. None: with a stage, its own rows, one sequence right behind the other.
      For batched caches None.
    layout: "NHD" or "HND": whether tokens or heads come first.
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
      [B, H, S]), also with a last dimension of groups, or for all heads together [T], [B, S]. A
      scale of a whole tensor moves nowhere, and isn't given.

    Wherever lengths or boundaries are taken: ints, uploaded in the call without synchronisation, or
    `Ints(host, device)`, used as they are. While a CUDA graph is captured only the latter.
    """

    stage: CacheStage | None = None
    seq_starts: IntsLike | None = None


@dataclass(frozen=True, eq=False)
class PagedCache(_Cache):
    """A paged cache, and which of its rows stay: row r of sequence b lies at place r % block_size
    of block block_table[b, r // block_size].

    k_caches: a tensor, or one for each layer: blocks [N, block_size, H, D], or with layout "HND"
      [N, H, block_size, D]; views of any strides with unit stride on D, so that any engine's pool
      fits. Or slots [N * block_size, H, D] (HND: [H, N * block_size, D]) and a block_size.
    v_caches, stage, layout, keep_indices, cu_kept, cu_rows, prefix_lens, seq_lens: as for
      `DenseCache`.
    block_table: int32 or int64 [B, max_blocks] on the device of the caches, any distance between
      rows. Entries behind a sequence's last block aren't read.
    block_size: None: that of the blocks.
    edit_table: False: the table stays as it is, and rows move to the front of each sequence's
      blocks. True: a page of the new cache reuses the block of its last row if that row's offset
      in it already matches, else the block of its first row; rows whose offset matches in that
      block don't move, and the result holds the new table. So where what is dropped in front of the
      suffix is a multiple of block_size, no row of the suffix moves, nor, with block_size 1, any
      row. Needs the same rows for all heads and layers.
    block_table_host: a copy of block_table in host memory, any integer type; on CPU the table
      itself serves. Where both are in host memory they must name the same blocks; else the host's
      rules what is checked and which blocks are free, the device's what is moved.
    read_only_blocks: blocks that must not be written: shared through a prefix cache, or to be
      copied on write. Rows in them may stay, or be read on their way into another block. In host
      memory; or, where the table is on a device alone, there, contiguous int32 or int64.
    k_scales, v_scales: one for each layer, moved along: [N, block_size, H] (HND:
      [N, H, block_size]), also with a last dimension of groups, or for all heads together
      [N, block_size]; with slots [N * block_size, H] and so on.
    """

    block_table: Tensor
    stage: CacheStage | None = None
    block_size: int | None = None
    _: KW_ONLY
    edit_table: bool = False
    block_table_host: Tensor | np.ndarray | None = None
    read_only_blocks: Blocks | None = None


Kind = TypeVar("Kind", DenseCache, PagedCache)


def cache_of(kind: type[Kind], given: DenseCache | PagedCache | Tensors, **words: Any) -> Kind:
    """The cache that a call names: all in words, or `given` with the words that it leaves open.

    words: all fields but k_caches; None, False and v_caches=() say nothing.
    Raises TypeError for a cache of the other kind, ValueError for what is said in both.
    """
    traced = torch.compiler.is_compiling()
    if not isinstance(given, _Cache):
        if words["layout"] is None:
            words["layout"] = "NHD"
        if traced:
            return kind(given, **words)
        cache = object.__new__(kind)  # in a third of the time that a frozen class takes
        cache.__dict__.update(words, k_caches=given, _kept=None)
        return cache
    if not isinstance(given, kind):
        raise TypeError(
            f"k_caches: expected tensors or a {kind.__name__}, got a {type(given).__name__}"
        )
    if isinstance(words["v_caches"], tuple) and not words["v_caches"]:
        words["v_caches"] = None
    said = {name: x for name, x in words.items() if x is not None and x is not False}
    for name in said:
        own = getattr(given, name)
        if own is not None and own is not False:
            raise ValueError(
                f"{name}: expected it in the {kind.__name__} or in the call, got it in both"
            )
    if not said:
        return given
    if traced:
        return replace(given, **said)
    cache = object.__new__(kind)
    cache.__dict__.update(given.__dict__, **said)
    return cache
