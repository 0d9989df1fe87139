# mypy: allow-untyped-defs, allow-incomplete-defs
"""Residual add and RMSNorm of the rows that survive, which are the only ones read."""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adsc_kernels import fakes
from adsc_kernels.triton.launch import Packed, launch, next_power_of_2, row_map, unit_of
from adsc_kernels.triton.segment import ROW_MAP, RowMap, source_rows


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


class Norm(NamedTuple):
    """Five tensors as kernels take them; strides count units."""

    x: Any
    residual: Any
    weight: Any
    normed: Any  # to be written
    residual_out: Any
    x_stride: int
    residual_stride: int


class NormShape(NamedTuple):
    """What kernels are compiled for."""

    UNIT: int  # elements of a unit
    WIDTH: int  # units of a row
    BLOCK: int  # elements that a program holds at once
    EPS: float


@triton.jit
def add_rms_norm_row(norm, row, source, found, SHAPE: tl.constexpr):
    """Makes output row `row`. Of one longer than BLOCK the sum is read back, from cache."""
    SIZE: tl.constexpr = SHAPE.WIDTH * SHAPE.UNIT
    x = norm.x + source * norm.x_stride * SHAPE.UNIT
    residual = norm.residual + source * norm.residual_stride * SHAPE.UNIT
    normed = norm.normed + row * SIZE
    residual_out = norm.residual_out + row * SIZE
    if SIZE <= SHAPE.BLOCK:
        column = tl.arange(0, SHAPE.BLOCK)
        total = add(x, residual, residual_out, column, found, SIZE)
        scale = scale_of(total * total, found, SIZE, SHAPE.EPS)
        store_normed(total, scale, norm.weight, normed, column, SIZE)
    else:
        COMPUTE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
        BLOCK: tl.constexpr = SHAPE.BLOCK  # Triton 3.6 takes no field in a shape
        squares = tl.zeros([BLOCK], COMPUTE)
        for start in range(0, SIZE, SHAPE.BLOCK):
            column = start + tl.arange(0, SHAPE.BLOCK)
            total = add(x, residual, residual_out, column, found, SIZE)
            squares += total * total
        scale = scale_of(squares, found, SIZE, SHAPE.EPS)
        tl.debug_barrier()  # what other threads of the program wrote is read below
        for start in range(0, SIZE, SHAPE.BLOCK):
            column = start + tl.arange(0, SHAPE.BLOCK)
            total = tl.load(residual_out + column, mask=column < SIZE, other=0).to(COMPUTE)
            store_normed(total, scale, norm.weight, normed, column, SIZE)


@triton.jit(do_not_specialize=ROW_MAP, do_not_specialize_on_alignment=ROW_MAP)
def add_rms_norm_kernel(
    norm, rows, num_segments, steps, num_tokens, num_rows, BY_INDEX: tl.constexpr,
    SHAPE: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """One program makes one row."""
    row_map = RowMap(rows, num_segments, steps, num_tokens, num_rows, BY_INDEX)
    row = tl.program_id(0).to(tl.int64)
    source, found = source_rows(row_map, row, CHECK)
    add_rms_norm_row(norm, row, source, found, SHAPE)


_BLOCK_BYTES = 32 << 10
_WARP_BYTES = 1 << 10  # two accesses of 16 bytes for each thread and tensor


def block_of(size: int, element_size: int) -> tuple[int, int]:
    """Elements that a program holds at once, and its warps, for rows of `size` elements."""
    block = min(next_power_of_2(size), _BLOCK_BYTES // element_size)
    return block, min(max(block * element_size // _WARP_BYTES, 1), 16)


class Fit:
    """What a norm is compiled for. One object stands for what it was made of: it is a part of keys,
    and told from others by identity.

    strides: of x and residual, in elements. alignments: of the five addresses, modulo 16.
    """

    def __init__(
        self,
        size: int,
        strides: tuple[int, int],
        dtype: torch.dtype,
        alignments: tuple[int, ...],
        eps: float,
    ) -> None:
        width = dtype.itemsize
        in_bytes = [count * width for count in (size, *strides)]
        unit = unit_of(*alignments, *in_bytes).size // width
        block, self.warps = block_of(size, width)
        self.shape = NormShape(unit, size // unit, block, eps)
        self.strides = tuple([stride // unit for stride in strides])


_fit_of = functools.lru_cache(maxsize=1024)(Fit)


def norm_of(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, normed: Tensor, residual_out: Tensor
) -> tuple[Packed, NormShape, int]:
    """`Norm` as kernels take it, and the warps of a program. normed and residual_out: to be
    written."""
    tensors = (x, residual, weight, normed, residual_out)
    addresses = tuple(map(Tensor.data_ptr, tensors))
    alignments = tuple([address & 15 for address in addresses])
    fit = _fit_of(x.shape[1], (x.stride(0), residual.stride(0)), x.dtype, alignments, eps)
    typed = functools.partial(Norm, *tensors, *fit.strides)
    return Packed(fit, (*addresses, *fit.strides), typed), fit.shape, fit.warps


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
    outs = fakes.downsample_add_rms_norm(
        x, residual, weight, segments, keep_indices, num_tokens, eps
    )
    if outs[0].numel() > 0:
        norm, shape, warps = norm_of(x, residual, weight, eps, *outs)
        rows = row_map(segments, keep_indices, num_tokens, x.shape[0])
        launch(add_rms_norm_kernel, num_tokens, x.device, (norm, *rows, shape), num_warps=warps)
    return outs
