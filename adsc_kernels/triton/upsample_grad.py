# mypy: allow-untyped-defs, allow-incomplete-defs
"""The backward of moving rows: each source row gets the sum over the output rows that took it.

Which those are has no closed form for a list of indices, nor for a table whose segments lie in any
order: the source rows are sorted, stably, and a row's takers follow each other in that order. So
the sum is the same on every run, and in the same order as on the CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adsc_kernels import fakes
from adsc_kernels.triton.downsample import tile_of
from adsc_kernels.triton.launch import CHECK, cdiv, launch, row_map, unit_of
from adsc_kernels.triton.segment import ROW_MAP, RowMap, source_rows


@triton.jit(do_not_specialize=ROW_MAP, do_not_specialize_on_alignment=ROW_MAP)
def source_rows_kernel(
    out, rows, num_segments, steps, num_tokens, num_rows, BY_INDEX: tl.constexpr,
    BLOCK: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """The source row of every output row; num_rows for a row without one."""
    row_map = RowMap(rows, num_segments, steps, num_tokens, num_rows, BY_INDEX)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source, found = source_rows(row_map, row, CHECK)
    tl.store(out + row, tl.where(found, source, num_rows), mask=row < num_tokens)


@triton.jit
def sources_below(sources, num_tokens, steps, row):
    """How many of the sorted sources are below row."""
    low = row * 0
    high = low + num_tokens
    for _ in range(steps):  # 2^steps > num_tokens
        middle = (low + high) // 2
        unsure = low < high
        below = unsure & (tl.load(sources + middle, mask=unsure, other=0) < row)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


_BATCH = ["sources", "takers", "steps", "num_tokens", "num_rows"]


@triton.jit(do_not_specialize=_BATCH, do_not_specialize_on_alignment=_BATCH)
def upsample_grad_kernel(
    grad,
    out,
    sources,
    takers,
    steps,
    num_tokens,
    num_rows,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHECK: tl.constexpr,
):
    """One program sums one tile of out. Rows are WIDTH units of UNIT elements.

    sources: sorted; takers: the output row of each.
    """
    SIZE: tl.constexpr = WIDTH * UNIT
    ACROSS: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS
    COMPUTE: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    tile = tl.program_id(0).to(tl.int64)
    row = tile // ACROSS * ROWS + tl.arange(0, ROWS)
    column = (tile % ACROSS).to(tl.int32) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < SIZE
    first = sources_below(sources, num_tokens, steps, row)
    last = sources_below(sources, num_tokens, steps, row + 1)
    # The first taker apart, so that a row with one taker gets its very bits.
    some = first < last
    taker = tl.load(takers + first, mask=some, other=0)
    place = grad + (taker * SIZE)[:, None] + column[None, :]
    total = tl.load(place, mask=some[:, None] & inside[None, :], other=0).to(COMPUTE)
    for i in range(1, tl.max(last - first, 0)):
        some = first + i < last
        taker = tl.load(takers + first + i, mask=some, other=0)
        place = grad + (taker * SIZE)[:, None] + column[None, :]
        total += tl.load(place, mask=some[:, None] & inside[None, :], other=0).to(COMPUTE)
    place = out + (row * SIZE)[:, None] + column[None, :]
    wanted = (row < num_rows)[:, None] & inside[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=wanted)


_BLOCK = 256


def upsample_grad(
    grad: Tensor, segments: Tensor | None, keep_indices: Tensor | None, num_rows: int
) -> Tensor:
    """The gradient of x: [num_rows, ...], from that of its surviving rows, which is contiguous."""
    num_tokens, device = grad.shape[0], grad.device
    out = fakes.upsample_grad(grad, segments, keep_indices, num_rows)
    if out.numel() == 0:
        return out
    real_out = out
    if grad.is_complex():
        grad, real_out = torch.view_as_real(grad), torch.view_as_real(out)

    if keep_indices is None or CHECK:
        rows = torch.empty(num_tokens, dtype=torch.int64, device=device)
        if num_tokens > 0:
            arguments = (rows, *row_map(segments, keep_indices, num_tokens, num_rows), _BLOCK)
            launch(source_rows_kernel, cdiv(num_tokens, _BLOCK), device, arguments)
    else:
        rows = keep_indices
    sources, takers = torch.sort(rows, stable=True)

    size, bytes_ = real_out[0].numel(), grad.element_size()
    unit = unit_of(grad.data_ptr(), out.data_ptr(), size * bytes_).size // bytes_
    tile_rows, columns = tile_of(size)
    launch(
        upsample_grad_kernel,
        cdiv(num_rows, tile_rows) * cdiv(size, columns),
        device,
        (
            *(grad, real_out, sources, takers, num_tokens.bit_length(), num_tokens, num_rows),
            *(unit, size // unit, tile_rows, columns),
        ),
    )
    return out
