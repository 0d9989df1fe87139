# mypy: allow-untyped-defs, allow-incomplete-defs
"""Residual add and RMSNorm of the rows that survive, which are the only ones read."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adsc_kernels.triton.launch import BATCH_ARGUMENTS, launch, row_layout, row_map, unit_of
from adsc_kernels.triton.segment import source_rows


@triton.jit
def add(x, residual, residual_out, column, found, SIZE: tl.constexpr):
    """The sum, rounded to the elements' type, written and returned, as float32 or float64."""
    COMPUTE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    there = column < tl.where(found, SIZE, 0)
    a = tl.load(x + column, mask=there, other=0).to(COMPUTE)
    b = tl.load(residual + column, mask=there, other=0).to(COMPUTE)
    total = (a + b).to(x.dtype.element_ty)
    tl.store(residual_out + column, total, mask=column < SIZE)
    return total.to(COMPUTE)


@triton.jit
def scale_of(squares, found, SIZE: tl.constexpr, EPS: tl.constexpr):
    """1 / sqrt(mean of squares + EPS); 0 for a row without a source, which becomes 0."""
    return tl.where(found, tl.rsqrt(tl.sum(squares, 0) / SIZE + EPS), 0)


@triton.jit
def store_normed(total, scale, weight, normed, column, SIZE: tl.constexpr):
    """The sum times scale and weight, rounded once."""
    inside = column < SIZE
    weights = tl.load(weight + column, mask=inside, other=0).to(total.dtype)
    tl.store(normed + column, (total * scale * weights).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def add_rms_norm_row(
    x,
    residual,
    weight,
    normed,
    residual_out,
    found,
    SIZE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, given where it begins. Of one longer than BLOCK the sum is read back, from cache."""
    if SIZE <= BLOCK:
        column = tl.arange(0, BLOCK)
        total = add(x, residual, residual_out, column, found, SIZE)
        scale = scale_of(total * total, found, SIZE, EPS)
        store_normed(total, scale, weight, normed, column, SIZE)
    else:
        COMPUTE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
        squares = tl.zeros([BLOCK], COMPUTE)
        for start in range(0, SIZE, BLOCK):
            total = add(x, residual, residual_out, start + tl.arange(0, BLOCK), found, SIZE)
            squares += total * total
        scale = scale_of(squares, found, SIZE, EPS)
        tl.debug_barrier()  # what other threads of the program wrote is read below
        for start in range(0, SIZE, BLOCK):
            column = start + tl.arange(0, BLOCK)
            total = tl.load(residual_out + column, mask=column < SIZE, other=0).to(COMPUTE)
            store_normed(total, scale, weight, normed, column, SIZE)


@triton.jit(do_not_specialize=BATCH_ARGUMENTS, do_not_specialize_on_alignment=BATCH_ARGUMENTS)
def add_rms_norm_kernel(
    x,
    residual,
    weight,
    normed,
    residual_out,
    x_stride,
    residual_stride,
    rows,
    num_segments,
    steps,
    num_tokens,
    num_rows,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    BY_INDEX: tl.constexpr,
    CHECK: tl.constexpr,
):
    """One program makes one row. Strides and WIDTH count units of UNIT elements."""
    row = tl.program_id(0).to(tl.int64)
    source, found = source_rows(
        rows, num_segments, steps, row, num_tokens, num_rows, BY_INDEX, CHECK
    )
    add_rms_norm_row(
        x + source * x_stride * UNIT,
        residual + source * residual_stride * UNIT,
        weight,
        normed + row * (WIDTH * UNIT),
        residual_out + row * (WIDTH * UNIT),
        found,
        WIDTH * UNIT,
        EPS,
        BLOCK,
    )


_BLOCK_BYTES = 32 << 10
_WARP_BYTES = 1 << 10  # two accesses of 16 bytes for each thread and tensor


def block_of(size: int, element_size: int) -> tuple[int, int]:
    """Elements that a program holds at once, and its warps, for rows of `size` elements."""
    block = min(triton.next_power_of_2(size), _BLOCK_BYTES // element_size)
    return block, min(max(block * element_size // _WARP_BYTES, 1), 16)


class Norm(NamedTuple):
    """Five tensors as kernels take them."""

    pointers: tuple[Any, ...]  # x, residual, weight, normed, residual_out, and two strides
    constants: tuple[int, ...]  # UNIT, WIDTH, BLOCK
    warps: int


def norm_of(
    x: Tensor, residual: Tensor, weight: Tensor, normed: Tensor, residual_out: Tensor
) -> Norm:
    """normed and residual_out: to be written."""
    tensors = (x, residual, weight, normed, residual_out)
    bytes_, size = x.element_size(), x.shape[1]
    lengths = [bytes_ * n for n in (size, x.stride(0), residual.stride(0))]
    unit = unit_of(*(tensor.data_ptr() for tensor in tensors), *lengths).size // bytes_
    block, warps = block_of(size, bytes_)
    strides = (x.stride(0) // unit, residual.stride(0) // unit)
    return Norm((*tensors, *strides), (unit, size // unit, block), warps)


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_norm(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    """Raises ValueError where they don't go together."""
    if x.dim() != 2 or x.dtype not in _DTYPES:
        raise ValueError(
            f"x: expected floating-point [rows, hidden], got {x.dtype} and shape {tuple(x.shape)}"
        )
    for name, tensor, shape in (("residual", residual, x.shape), ("weight", weight, x.shape[1:])):
        if tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected {x.dtype} and shape {tuple(shape)} on {x.device}, got "
                f"{tensor.dtype} and shape {tuple(tensor.shape)} on {tensor.device}"
            )
    if not weight.is_contiguous():
        raise ValueError(f"weight: expected a contiguous tensor, got strides {weight.stride()}")


def downsample_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    segments: Tensor | None,
    keep_indices: Tensor | None,
    num_tokens: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `adsc_kernels.ops.downsample_add_rms_norm`."""
    check_norm(x, residual, weight)
    x_rows = row_layout(x, "x")
    row_layout(residual, "residual")
    movement = row_map(segments, keep_indices, num_tokens, x_rows.num_rows, x.device)
    normed, residual_out = (x.new_empty((num_tokens, x_rows.size)) for _ in range(2))
    if normed.numel() > 0:
        norm = norm_of(x, residual, weight, normed, residual_out)
        constants = (*norm.constants, eps, movement.by_index)
        arguments = (*norm.pointers, *movement.arguments, *constants)
        launch(add_rms_norm_kernel, num_tokens, x.device, arguments, num_warps=norm.warps)
    return normed, residual_out
