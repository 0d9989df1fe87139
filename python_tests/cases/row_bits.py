"""Rows of any bit patterns in every dtype, and views of them with every kind of stride."""

import torch
from torch import Tensor

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16,
    torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.complex32, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip
STRIDES = ["dense", "every second", "columns of a wider matrix", "one row, expanded"]
TRAILING = [(), (1,), (2,), (3,), (4,), (16,), (33,), (2, 3), (1, 1, 5), (0,), (4, 0)]


def random_bits(rows: int, trailing: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit patterns, not-a-number ones included: a row is bytes to the ops that move it."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, *trailing, dtype.itemsize)
    count = torch.Size(shape).numel()
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (-(-count // 8),), generator=generator)
    data = words.view(torch.uint8)[:count].reshape(shape)
    if dtype == torch.bool:
        data = data & 1
    return data.view(dtype)[..., 0]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().unsqueeze(-1).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def strided_rows(x: Tensor, kind: str) -> Tensor:
    """The same values with other strides between rows."""
    if kind == "dense" or x.numel() == 0:
        return x
    if kind == "every second":
        return torch.stack([x, torch.zeros_like(x)], 1)[:, 0]
    if kind == "columns of a wider matrix":
        flat = x.reshape(x.shape[0], -1)
        wide = torch.zeros(x.shape[0], flat.shape[1] + 3, dtype=x.dtype)
        wide[:, : flat.shape[1]] = flat
        return wide.as_strided(x.shape, (wide.stride(0), *x.stride()[1:]))
    return x[:1].expand(x.shape)  # "one row, expanded"


def shifted(x: Tensor, elements: int) -> Tensor:
    """The same values `elements` further on in memory: aligned to no more than that."""
    if x.numel() == 0 or elements == 0:
        return x
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    memory = torch.zeros(extent + elements, dtype=x.dtype)
    view = memory.as_strided(x.shape, x.stride(), elements)
    view.copy_(x)
    return view
