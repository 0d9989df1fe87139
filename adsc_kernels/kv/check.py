"""What the compaction ops check before they call anything, and what they call it with."""

import operator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adsc_kernels import checks
from adsc_kernels.backend import CHECK
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.kv.cache import Blocks, CacheLayout, CacheStage, DenseCache, PagedCache
from adsc_kernels.kv.pages import CompactionResult, HostRows, Ints, Pages, check_pages
from adsc_kernels.kv.rows import Rows, check_ints, check_rows
from adsc_kernels.kv.tensors import Caches, axis, known_caches
from adsc_kernels.plan import to_device
from adsc_kernels.rows import check_table, check_tensor, is_readable


class PageArguments(NamedTuple):
    """What the ops take of a paged cache besides its tensors and its rows."""

    block_table: Tensor | None = None
    block_size: int = 0
    edit_table: bool = False
    read_only_blocks: Tensor | None = None


class CompactionCall(NamedTuple):
    """The arguments of one of the two ops, checked, and what the host knows of its results.

    It has no properties: torch 2.10's Dynamo doesn't follow those of a NamedTuple.
    """

    caches: Caches
    layout: CacheLayout
    rows: Rows
    new_lens: tuple[int, ...]
    seq_starts: Tensor | None = None  # of a packed cache
    paged: PageArguments | None = None
    pages: Pages | None = None

    def arguments(self, of_step: bool = False) -> tuple[Any, ...]:
        """In the order of the op's schema, or of its overload's for caches that are kept.

        of_step: those of `compress_step`, which takes either kind.
        """
        rows: tuple[Any, ...] = (*self.rows, self.seq_starts)
        if self.paged is not None or of_step:
            table, size, edit_table, read_only = self.paged or PageArguments()
            rows = (table, size, *(rows if of_step else self.rows), edit_table, read_only)
        caches = self.caches
        if caches.number is not None:
            return (caches.number, *rows)
        return (caches.tensors, caches.num_layers, *rows, self.layout)

    def result(
        self,
        lens: Tensor,
        slots: Tensor,
        last_page_len: Tensor | None = None,
        indptr: Tensor | None = None,
        new_table: Tensor | None = None,
    ) -> CompactionResult:
        """lens and on: what the op returned."""
        pages = self.pages
        fields: dict[str, Any] = {
            "seq_lens": Ints(self.new_lens, lens),
            "slot_mapping": slots,
            "block_table": new_table,
            "last_page_len": last_page_len,
            "indptr": indptr,
            "released_blocks": None if pages is None else pages.released,
            "free_blocks": None if pages is None else pages.free,
        }
        if self.paged is not None and not self.paged.edit_table:
            fields["block_table"] = self.paged.block_table
        if torch.compiler.is_compiling():
            return CompactionResult(**fields)
        result = object.__new__(CompactionResult)  # in less time than a frozen class takes
        result.__dict__.update(fields)
        return result


def check_dense(
    cache: DenseCache, stage: CacheStage | None, native: bool = False
) -> CompactionCall:
    """The arguments of `compact_kv_`. Raises as it does.

    stage: the cache's, or what stands for one.
    native: but for what the native op checks itself, and is left to.
    """
    caches = known_caches(cache, native)
    rows, host = check_rows(cache, stage, caches, with_sources=False, native=native)
    starts, room = _room(cache, stage, caches, host.batch)
    if any(map(operator.gt, host.seq_lens, room)):
        b = next(i for i, length in enumerate(host.seq_lens) if length > room[i])
        raise ValueError(
            f"seq_lens: expected at most {room[b]} rows, the room of sequence {b}, "
            f"got {host.seq_lens[b]}"
        )
    return CompactionCall(caches, cache.layout, rows, host.new_lens, starts)


def _room(
    cache: DenseCache, stage: CacheStage | None, caches: Caches, batch: int
) -> tuple[Tensor | None, tuple[int, ...]]:
    """Where each sequence begins, in a packed cache, and how many rows it has room for."""
    first = caches.tensors[0]
    if first.dim() == 4:
        if cache.seq_starts is not None:
            raise ValueError(
                f"seq_starts: expected None for batched caches, got {cache.seq_starts}"
            )
        if batch != caches.blocks:
            raise ValueError(
                f"k_caches[0]: expected {batch} sequences, got shape {tuple(first.shape)} "
                f"in layout {cache.layout}"
            )
        return None, (caches.tokens,) * batch
    if cache.seq_starts is not None:
        bounds, starts = check_ints(cache.seq_starts, "seq_starts", batch + 1, first)
        if torch.compiler.is_compiling():
            return starts, ()
        if any(b < a for a, b in pairwise(bounds)) or bounds[-1] > caches.tokens:
            raise ValueError(
                f"seq_starts: expected rising boundaries of at most {caches.tokens}, got {bounds}"
            )
        return starts, tuple(b - a for a, b in pairwise(bounds))
    if stage is None:
        raise ValueError("seq_starts: expected it for packed caches with keep_indices, got None")
    if stage.num_tokens_in > caches.tokens:
        raise ValueError(
            f"k_caches[0]: expected at least {stage.num_tokens_in} tokens "
            f"(stage.num_tokens_in), got {caches.tokens}"
        )
    return stage.cu_seqlens_in, () if torch.compiler.is_compiling() else stage.seq_lens_in


def check_paged(
    cache: PagedCache, stage: CacheStage | None, native: bool = False
) -> CompactionCall:
    """`check_dense` for `compact_paged_kv_`."""
    checks.flag("edit_table", cache.edit_table)
    caches = known_caches(cache, native)
    size, num_blocks = _block_size(cache, caches)
    with_sources = cache.edit_table or cache.read_only_blocks is not None
    rows, host = check_rows(cache, stage, caches, with_sources, native)
    first = caches.tensors[0]
    _check_block_table(cache, first, size, host)
    if cache.edit_table and rows.keep_indices is not None and rows.keep_indices.shape[:2] != (1, 1):
        raise UnsupportedError(
            "edit_table: one table can't serve heads or layers that keep different rows, got "
            f"keep_indices of shape {tuple(rows.keep_indices.shape)}"
        )
    table, pages = _host_table(cache, host, size), None
    if table is None:
        read_only = _unseen_blocks(cache.read_only_blocks, first, num_blocks)
    else:
        blocks = _host_blocks(cache.read_only_blocks, num_blocks)
        name = "block_table" if cache.block_table_host is None else "block_table_host"
        pages = check_pages(table, host, size, num_blocks, cache.edit_table, blocks, name)
        checked = first.device.type == "cuda" and not CHECK  # nothing is left for the op
        read_only = None if checked or cache.read_only_blocks is None else _uploaded(blocks, first)
    paged = PageArguments(cache.block_table, size, cache.edit_table, read_only)
    return CompactionCall(caches, cache.layout, rows, host.new_lens, paged=paged, pages=pages)


def _block_size(cache: PagedCache, caches: Caches) -> tuple[int, int]:
    """Rows of a block, and blocks of the pool."""
    first, size = caches.tensors[0], cache.block_size
    if size is not None:
        checks.integer("block_size", size, 1, checks.INT32_MAX)
    if first.dim() == 4:
        if size not in (None, caches.tokens):
            place = axis(4, cache.layout, "token")
            raise ValueError(
                f"block_size: expected {caches.tokens}, dimension {place} of k_caches[0] in layout "
                f"{cache.layout}, got {size} for shape {tuple(first.shape)}"
            )
        return caches.tokens, caches.blocks
    if size is None:
        raise ValueError("block_size: expected it for caches of slots, got None")
    if caches.tokens % size:
        raise ValueError(f"block_size: expected a divisor of the {caches.tokens} slots, got {size}")
    return size, caches.tokens // size


def _check_block_table(cache: PagedCache, first: Tensor, size: int, host: HostRows) -> None:
    table = cache.block_table
    check_tensor(table, "block_table", (torch.int32, torch.int64), first, "k_caches[0]")
    _check_table_shape(table, "block_table", host.batch)
    if table.numel() > 1 and table.shape[1] > 1 and table.stride(1) != 1:
        raise ValueError(
            f"block_table: expected unit stride within a row, got strides {tuple(table.stride())}"
        )
    for b, length in enumerate(host.seq_lens):
        if length > table.shape[1] * size:
            raise ValueError(
                f"seq_lens: expected at most {table.shape[1]} blocks of {size} rows for sequence "
                f"{b}, got {length} rows"
            )


def _check_table_shape(table: Tensor | np.ndarray, name: str, batch: int) -> None:
    if table.ndim != 2 or table.shape[0] != batch:
        raise ValueError(f"{name}: expected shape [{batch}, max_blocks], got {tuple(table.shape)}")


def _host_table(cache: PagedCache, rows: HostRows, size: int) -> np.ndarray | None:
    table, host = cache.block_table, cache.block_table_host
    if host is None:
        return table.numpy() if is_readable(table) else None
    if isinstance(host, Tensor):
        if host.device.type != "cpu":
            raise ValueError(
                f"block_table_host: expected a table in host memory, got one on {host.device}"
            )
        if not is_readable(host):
            return None
        host = host.numpy()
    if not isinstance(host, np.ndarray) or host.dtype.kind not in "iu":
        raise TypeError(
            "block_table_host: expected a CPU tensor or an array of integers, got "
            f"{getattr(host, 'dtype', type(host).__name__)}"
        )
    _check_table_shape(host, "block_table_host", rows.batch)
    if host.shape[1] < table.shape[1]:
        raise ValueError(
            f"block_table_host: expected {table.shape[1]} blocks a row, as in block_table, "
            f"got {host.shape[1]}"
        )
    if is_readable(table):
        _check_same_table(host, table.numpy(), rows.seq_lens, size)
    return host


def _check_same_table(
    host: np.ndarray, table: np.ndarray, lens: tuple[int, ...], size: int
) -> None:
    """Of two tables that the host can read, the entries that hold rows must be the same."""
    for b, length in enumerate(lens):
        pages = -(-length // size)
        differ = np.flatnonzero(host[b, :pages] != table[b, :pages])
        if differ.size:
            page = differ[0]
            raise ValueError(
                f"block_table_host: expected what block_table holds, block {table[b, page]} for "
                f"page {page} of sequence {b}, got {host[b, page]}"
            )


def _host_blocks(blocks: Blocks | None, num_blocks: int) -> np.ndarray:
    if isinstance(blocks, Tensor) and blocks.device.type != "cpu":
        raise ValueError(
            "read_only_blocks: expected blocks in host memory, as the table, got them on "
            f"{blocks.device}"
        )
    array = np.asarray([] if blocks is None else blocks)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"read_only_blocks: expected integers, got {array.dtype}")
    outside = array[(array < -1) | (array >= num_blocks)] if array.size else array
    if outside.size:
        raise ValueError(
            f"read_only_blocks: expected blocks of the pool, in [0, {num_blocks}), or -1 for none, "
            f"got {outside.ravel()[0]}"
        )
    return array.astype(np.int64).ravel()


def _unseen_blocks(blocks: Blocks | None, like: Tensor, num_blocks: int) -> Tensor | None:
    """read_only_blocks as the op takes them, where the host has seen no table."""
    if blocks is None:
        return None
    if isinstance(blocks, Tensor) and blocks.device.type != "cpu":
        check_table(blocks, "read_only_blocks", (torch.int32, torch.int64), like, "k_caches[0]")
        return blocks.view(-1)
    if torch.compiler.is_compiling():
        return torch.as_tensor(blocks, dtype=torch.int64, device=like.device).view(-1)
    return _uploaded(_host_blocks(blocks, num_blocks), like)


def _uploaded(blocks: np.ndarray, like: Tensor) -> Tensor:
    """read_only_blocks where the caches are."""
    if like.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"read_only_blocks: expected blocks on {like.device} while a graph is captured, since "
            "no graph keeps what an upload reads, got them in host memory"
        )
    return to_device(blocks, like.device)
