"""A decoder layer's pointwise work in Triton against PyTorch's own ops, in float64."""

import pytest
import torch
from cases.run import on

from adsc_kernels import UnsupportedError, pointwise
from adsc_kernels.pointwise import Place, Rope

TRITON, PLAIN = on("triton"), on("reference")
ERROR = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def rope_of(rows: int, size: int, dtype: torch.dtype) -> Rope:
    angles = torch.rand(rows, 1, size // 2) * 6
    sin = angles.sin()
    return Rope(angles.cos().repeat(1, 1, 2).to(dtype), torch.cat((-sin, sin), -1).to(dtype))


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(4, 4, 8), (6, 2, 12), (5, 1, 16), (1, 1, 2)]
)
@pytest.mark.parametrize("written", [True, False])
def test_rotate(dtype: torch.dtype, heads: int, kv_heads: int, size: int, written: bool) -> None:
    torch.manual_seed(heads)
    qkv = torch.randn(7, heads + 2 * kv_heads, size).to(dtype)
    rope = rope_of(7, size, dtype)

    def place() -> Place | None:
        k, v = torch.zeros(2, 11, kv_heads, size, dtype=dtype)
        return Place(k, v, torch.tensor([3, 10, 0, 4, 5, 8, 1])) if written else None

    exact = PLAIN(pointwise.rotate, qkv.double(), Rope(*(t.double() for t in rope)), kv_heads, None)
    mine, theirs = place(), place()
    got = TRITON(pointwise.rotate, qkv.clone(), rope, kv_heads, mine)
    PLAIN(pointwise.rotate, qkv.clone(), rope, kv_heads, theirs)
    for one, truth in zip(got[:2], exact[:2], strict=True):
        limit = ERROR[dtype] * truth.abs().clamp(min=0.25)
        assert bool(((one - truth).abs() <= limit).all())
    assert torch.equal(got[2], qkv[:, -kv_heads:])
    if mine is not None and theirs is not None:
        assert torch.equal(mine.k[mine.rows], got[1])
        assert torch.equal(mine.v, theirs.v)
        rest = [n for n in range(11) if n not in mine.rows.tolist()]
        assert not mine.k[rest].any()


@pytest.mark.parametrize("dtype", ERROR)
def test_rotate_by_address(dtype: torch.dtype) -> None:
    """Into the same rows as by tensors, and nowhere where a row is negative."""
    qkv, rope = torch.randn(5, 10, 8).to(dtype), rope_of(5, 8, dtype)
    caches = torch.ones(2, 2, 11, 2, 8, dtype=dtype)
    rows = torch.tensor([3, 10, 0, 4, 5])
    want = TRITON(pointwise.rotate, qkv.clone(), rope, 2, Place(*caches[0], rows))
    caches[0][:, rows[2]] = 1
    rows[2] = -1
    address = torch.tensor([cache.data_ptr() for cache in caches[1]])
    got = TRITON(pointwise.rotate, qkv.clone(), rope, 2, Place(*address.split(1), rows))
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(caches[1], caches[0])
    with pytest.raises(UnsupportedError, match="place: expected rows where Triton doesn't run"):
        PLAIN(pointwise.rotate, qkv.clone(), rope, 2, Place(*address.split(1), rows))


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("inner", [1, 48, 1024, 1500])
def test_silu_mul(dtype: torch.dtype, inner: int) -> None:
    torch.manual_seed(inner)
    gate_up = torch.randn(3, 2 * inner).to(dtype)
    exact = PLAIN(pointwise.silu_mul, gate_up.double())
    got = TRITON(pointwise.silu_mul, gate_up)
    assert got.dtype is dtype
    limit = ERROR[dtype] * exact.abs().clamp(min=0.25)
    assert bool(((got - exact).abs() <= limit).all())


def test_no_rows() -> None:
    rope = rope_of(0, 8, torch.float32)
    parts = TRITON(pointwise.rotate, torch.empty(0, 6, 8), rope, 2, None)
    assert [part.shape for part in parts] == [(0, 2, 8)] * 3
    assert TRITON(pointwise.silu_mul, torch.empty(0, 8)).shape == (0, 4)
