"""Engines' tables as block tables and back.

These copy, so call them where an engine builds its batch, and not for each layer.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from adsc_kernels import checks
from adsc_kernels.rows import is_readable

SLOT_OF_PADDING = 0  # SGLang writes the K and V of padding there


def csr_to_block_table(indices: Tensor, indptr: Sequence[int]) -> Tensor:
    """FlashInfer's kv_indices [blocks of all] and kv_indptr, B + 1 host ints, to [B, max_blocks].

    -1 stands behind each sequence's blocks. It doesn't wait for the device.
    """
    counts = _host(indptr, "indptr")
    if not counts or counts[0] != 0 or counts[-1] != indices.shape[0] or counts != sorted(counts):
        raise ValueError(
            f"indptr: expected ints from 0 to the {indices.shape[0]} indices that never decrease, "
            f"got {counts}"
        )
    if len(counts) == 1:
        return indices.new_empty((0, 0))
    rows = indices.split([end - begin for begin, end in pairwise(counts)])
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-1)


def block_table_to_csr(block_table: Tensor, num_blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[B, max_blocks] and each sequence's count, host ints, to FlashInfer's (indices, indptr).

    indices keep the table's dtype (FlashInfer asks for int32), indptr is int32 [B + 1].
    """
    counts = _host(num_blocks, "num_blocks")
    if len(counts) != block_table.shape[0] or not all(
        0 <= n <= block_table.shape[1] for n in counts
    ):
        raise ValueError(
            f"num_blocks: expected {block_table.shape[0]} ints up to {block_table.shape[1]}, "
            f"got {counts}"
        )
    rows = [block_table[b, :n] for b, n in enumerate(counts)]
    indptr = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    indices = torch.cat(rows) if rows else block_table.new_empty(0)
    return indices, indptr.to(block_table.device, non_blocking=True)


def req_to_token_to_block_table(
    req_to_token: Tensor,
    req_pool_indices: Tensor | Sequence[int],
    *,
    page_size: int = 1,
    max_len: int | None = None,
) -> Tensor:
    """SGLang's req_to_token [requests, context], int32 slots, to the table of some requests' pages.

    req_pool_indices: the requests' rows. max_len: of the longest, if less than the context.
    """
    rows = req_to_token[:, :max_len].index_select(0, _on(req_pool_indices, req_to_token))
    return rows if page_size == 1 else rows[:, ::page_size] // page_size


def req_to_token_to_csr(
    req_to_token: Tensor, req_pool_indices: Tensor | Sequence[int], seq_lens: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """SGLang's req_to_token to FlashInfer's (indices, indptr) at page size 1.

    seq_lens: rows of each request, host ints.
    """
    lens = _host(seq_lens, "seq_lens")
    table = req_to_token_to_block_table(
        req_to_token, req_pool_indices, max_len=max(lens, default=0)
    )
    return block_table_to_csr(table, lens)


def block_table_to_req_to_token_(
    req_to_token: Tensor,
    req_pool_indices: Tensor | Sequence[int],
    block_table: Tensor,
    *,
    page_size: int = 1,
) -> None:
    """Write an edited table (`compact_paged_kv_(..., edit_table=True)`) into SGLang's req_to_token.

    What lies behind a sequence's pages becomes the slot of padding. Pages in front of it fit into
    the context, but for the rest of the last, and slots into the dtype of req_to_token: ValueError
    where the host can read the table, which it does not on a device.
    """
    checks.integer("page_size", page_size, 1)
    context = req_to_token.shape[1]
    _check_pages(block_table, page_size, context, torch.iinfo(req_to_token.dtype).max)
    slots = block_table
    if page_size > 1:
        offsets = torch.arange(page_size, dtype=block_table.dtype, device=block_table.device)
        slots = (block_table[:, :, None] * page_size + offsets).flatten(1)
    slots = slots[:, :context].clamp_min(SLOT_OF_PADDING).to(req_to_token.dtype)
    rows = _on(req_pool_indices, req_to_token)
    req_to_token[:, : slots.shape[1]].index_copy_(0, rows, slots)


def trtllm_offsets_to_block_table(offsets: Tensor) -> Tensor:
    """TensorRT-LLM's K-plane offsets [B, max_blocks] to pages of `[pages, 2, H, tokens, D]`.

    They count planes, of which a page has two: what its own `sparse_kv_cache_compact_layers` takes
    for the pools of its second cache manager. Raises ValueError for an odd one, which is no K
    plane's, where the host can read them; -1 stands for none.
    """
    if is_readable(offsets):
        odd = offsets[(offsets % 2 != 0) & (offsets != -1)]
        if odd.numel():
            raise ValueError(f"offsets: expected even ones, of K planes, got {int(odd[0])}")
    return torch.div(offsets, 2, rounding_mode="floor")


def _check_pages(block_table: Tensor, page_size: int, context: int, most: int) -> None:
    """That all pages' slots fit: none behind the context, none too large for its dtype."""
    if not is_readable(block_table) or not block_table.numel():
        return
    last = int(block_table.max())
    if (last + 1) * page_size - 1 > min(most, torch.iinfo(block_table.dtype).max):
        raise ValueError(
            f"block_table: expected pages of {page_size} slots of at most {most}, got page {last}"
        )
    pages = -(-context // page_size)
    behind = block_table[:, pages:]
    if (behind >= 0).any():
        raise ValueError(
            f"block_table: expected at most {pages} pages a row, as the context of req_to_token, "
            f"got page {int(behind.max())} behind them"
        )


def _on(indices: Tensor | Sequence[int], like: Tensor) -> Tensor:
    if not isinstance(indices, Tensor):
        indices = torch.tensor(list(indices), dtype=torch.int64)
    return indices.to(like.device, non_blocking=True)


def _host(values: Sequence[int], name: str) -> list[int]:
    if isinstance(values, Tensor):
        if values.device.type != "cpu":
            raise TypeError(f"{name}: expected host ints, got a tensor on {values.device}")
        return values.tolist()
    return list(values)
