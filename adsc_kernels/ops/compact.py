"""Shrinking a KV cache that is already written: `compact_kv_` and `compact_paged_kv_`."""

from collections.abc import Callable

import numpy as np
from torch import Tensor
from torch.autograd.graph import increment_version

from adsc_kernels import fakes
from adsc_kernels.kv.cache import (
    Blocks,
    CacheLayout,
    CacheStage,
    DenseCache,
    IntsLike,
    PagedCache,
    Tensors,
    cache_of,
)
from adsc_kernels.kv.check import CompactionCall, check_dense, check_paged
from adsc_kernels.kv.pages import CompactionResult
from adsc_kernels.ops._dispatch import call_in_place, choose, explain, native, register


def compact_kv_(
    k_caches: DenseCache | Tensors,
    v_caches: Tensors | None = (),
    stage: CacheStage | None = None,
    seq_starts: IntsLike | None = None,
    *,
    layout: CacheLayout | None = None,
    keep_indices: Tensor | None = None,
    cu_kept: IntsLike | None = None,
    cu_rows: IntsLike | None = None,
    prefix_lens: IntsLike | None = None,
    seq_lens: IntsLike | None = None,
    k_scales: Tensors | None = None,
    v_scales: Tensors | None = None,
) -> CompactionResult:
    """Moves the rows that stay to the front of each sequence's cache, in place, in all layers.

    The suffix moves up behind the rows that are kept, in the same pass. Rows that lie right already
    aren't touched, nor is anything behind a sequence's new end: what is left there is stale.

    k_caches: a `DenseCache`, which documents its fields; the other arguments then name those that
      it leaves None. Or its k_caches, and the others are the rest of its fields: v_caches always
      (None: there are none); a layout of None is "NHD".

    Returns `CompactionResult` with seq_lens and slot_mapping.

    Nothing is written if it raises: TypeError, ValueError or UnsupportedError, naming the argument.
    Before the launch the host checks types, shapes, strides, devices, all lengths against one
    another and against the room, and that no two caches share memory (that not under
    torch.compile). The contents of keep_indices and of segments are checked if they are on the CPU;
    on a device with ADSC_CHECK=1, where the kernel traps before its first write.
    """
    cache = cache_of(
        DenseCache,
        k_caches,
        v_caches=v_caches,
        stage=stage,
        seq_starts=seq_starts,
        layout=layout,
        keep_indices=keep_indices,
        cu_kept=cu_kept,
        cu_rows=cu_rows,
        prefix_lens=prefix_lens,
        seq_lens=seq_lens,
        k_scales=k_scales,
        v_scales=v_scales,
    )
    return _compact("compact_kv_", check_dense, cache)


def compact_paged_kv_(
    k_caches: PagedCache | Tensors,
    v_caches: Tensors | None = (),
    block_table: Tensor | None = None,
    stage: CacheStage | None = None,
    block_size: int | None = None,
    *,
    layout: CacheLayout | None = None,
    keep_indices: Tensor | None = None,
    cu_kept: IntsLike | None = None,
    cu_rows: IntsLike | None = None,
    prefix_lens: IntsLike | None = None,
    seq_lens: IntsLike | None = None,
    edit_table: bool = False,
    block_table_host: Tensor | np.ndarray | None = None,
    read_only_blocks: Blocks | None = None,
    k_scales: Tensors | None = None,
    v_scales: Tensors | None = None,
) -> CompactionResult:
    """`compact_kv_` of a paged cache.

    k_caches: a `PagedCache`, which documents its fields, such as an adapter of
      `integrations.layouts` gives; the other arguments then name those that it leaves None. Or its
      k_caches, and the others are the rest of its fields, as in `compact_kv_`.

    Returns `CompactionResult`, all of it.

    Errors as `compact_kv_`. What a table holds (a block outside the pool, one that two sequences or
    two pages share and that isn't in read_only_blocks, one of those that a move would write) is
    checked

    - on the host, without synchronisation, where the table or block_table_host is in host memory:
      ValueError. If keep_indices are on a device, or differ by head or layer, the host can't know
      which rows move, and takes every block behind the prefix for written. (Under torch.compile
      the host looks at no contents; the CPU op still does, itself.)
    - on a device with ADSC_CHECK=1, by launches in front of the one that moves: they trap, with
      the message in what the process prints. They know which rows move.
    - on a device also without ADSC_CHECK where read_only_blocks is given and the host has seen no
      table, in the same way, so that none of them is ever written. A trap ends all work of the
      process on that device; where moves into them may be asked for, give block_table_host.

    A table on a device alone, without read_only_blocks and without ADSC_CHECK, is taken as it is.
    """
    cache = cache_of(
        PagedCache,
        k_caches,
        v_caches=v_caches,
        block_table=block_table,
        stage=stage,
        block_size=block_size,
        layout=layout,
        keep_indices=keep_indices,
        cu_kept=cu_kept,
        cu_rows=cu_rows,
        prefix_lens=prefix_lens,
        seq_lens=seq_lens,
        edit_table=edit_table,
        block_table_host=block_table_host,
        read_only_blocks=read_only_blocks,
        k_scales=k_scales,
        v_scales=v_scales,
    )
    return _compact("compact_paged_kv_", check_paged, cache)


def _compact(
    name: str, check: Callable[..., CompactionCall], cache: DenseCache | PagedCache
) -> CompactionResult:
    op = native(name, cache.first())
    if op is None:
        call = check(cache, cache.stage)
        caches = call.caches
        chosen = choose(name, caches.tensors[0].device)
        results = call_in_place(
            chosen, *call.arguments(), written=caches.tensors, places=caches.places
        )
        return call.result(*results)
    try:
        call = check(cache, cache.stage, native=True)
        results = op[call.caches.number is not None](*call.arguments())
    except Exception as error:
        if not cache.forget():
            explain(error, check, cache, cache.stage)
    else:
        increment_version(call.caches.tensors)
        return call.result(*results)
    return _compact(name, check, cache)


# ---- Schemas ----

_ROWS = (
    "Tensor? segments, Tensor? keep_indices, Tensor cu_kept, Tensor? cu_rows, "
    "Tensor? prefix_lens, Tensor? seq_lens"
)
register(
    "compact_kv_",
    f"(Tensor(a!)[] caches, int num_layers, {_ROWS}, Tensor? seq_starts, str cache_layout) "
    "-> (Tensor, Tensor)",
    fake=fakes.compact_kv_,
    triton="compact",
)
register(
    "compact_paged_kv_",
    "(Tensor(a!)[] caches, int num_layers, Tensor block_table, SymInt block_size, "
    f"{_ROWS}, bool edit_table, Tensor? read_only_blocks, str cache_layout) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=fakes.compact_paged_kv_,
    triton="compact",
)
