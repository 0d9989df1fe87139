"""downsample_add_rms_norm: the sum bit for bit, the norm within twice PyTorch's error."""
# ruff: noqa: E501 (tables of cases, one a line)

from collections.abc import Callable

import pytest
import torch
from cases.segment_tables import FakeStage, image_stage, stage_of, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def drawn(rows: int, hidden: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * 1000 + hidden)
    x, residual = (
        torch.randn(2, rows, hidden, generator=generator, dtype=torch.float64) * scale
    ).to(dtype)
    weight = (torch.randn(hidden, generator=generator, dtype=torch.float64) + 1).to(dtype)
    return x, residual, weight


@settings(max_examples=100, deadline=None)
@given(
    stage=stages(),
    hidden=st.sampled_from([0, 1, 2, 7, 32, 64, 511, 512, 513, 1500]),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
)
def test_equals_reference(stage: FakeStage, hidden: int, dtype: torch.dtype, wide: bool) -> None:
    x, residual, weight = drawn(stage.num_tokens_in, hidden, dtype)
    if wide:  # rows of a wider matrix, such as the output of a fused projection
        x = torch.cat([x, x], 1)[:, :hidden]
        residual = residual[:, None].expand(-1, 3, -1).contiguous()[:, 1]
    normed, residual_out = ops.downsample_add_rms_norm(x, residual, weight, stage, 1e-5)
    want_normed, want_residual = reference.downsample_add_rms_norm(x, residual, weight, stage, 1e-5)
    assert torch.equal(residual_out, want_residual)
    assert normed.is_contiguous()
    assert normed.dtype == dtype
    torch.testing.assert_close(normed, want_normed)  # the error itself: the test below
    rows = torch.tensor(reference.source_rows(stage), dtype=torch.int32)
    again = ops.downsample_add_rms_norm(x, residual, weight, eps=1e-5, keep_indices=rows)
    assert torch.equal(again[0], normed)
    assert torch.equal(again[1], residual_out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 4096, 5120])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_error_at_most_twice_pytorchs(dtype: torch.dtype, hidden: int, scale: float) -> None:
    rows = torch.arange(64)
    x, residual, weight = drawn(64, hidden, dtype, scale)
    normed, h = ops.downsample_add_rms_norm(x, residual, weight, eps=1e-6, keep_indices=rows)
    assert torch.equal(h, x + residual)

    if dtype == torch.float64:  # its own truth: NumPy's extended precision
        wide = h.numpy().astype("longdouble")
        scales = ((wide * wide).mean(-1, keepdims=True) + 1e-6) ** -0.5
        truth = wide * scales * weight.numpy().astype("longdouble")

        def error(y: Tensor) -> float:
            return float(abs(y.numpy() - truth).max())
    else:
        exact = h.double()
        exact = exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()

        def error(y: Tensor) -> float:
            return float((y.double() - exact).abs().max())

    pytorch = torch.nn.functional.rms_norm(h, (hidden,), weight, 1e-6)
    assert error(normed) <= 2 * error(pytorch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(dtype: torch.dtype) -> None:
    """Each of the 2^16 values plus 0, and plus another: subnormals, infinities, nans, ties."""
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)[:, None]
    every = torch.arange(len(values))
    one = torch.ones(1, dtype=dtype)
    for other in (torch.zeros_like(values), values.flip(0), values.roll(321, 0)):
        _, sums = ops.downsample_add_rms_norm(values, other, one, eps=0.0, keep_indices=every)
        torch.testing.assert_close(sums, values + other, rtol=0, atol=0, equal_nan=True)


def test_only_surviving_rows_are_read() -> None:
    stage = image_stage()
    x, residual, weight = drawn(stage.num_tokens_in, 8, torch.float32)
    dropped = torch.ones(stage.num_tokens_in, dtype=torch.bool)
    dropped[reference.source_rows(stage)] = False
    before = ops.downsample_add_rms_norm(x, residual, weight, stage)
    x[dropped], residual[dropped] = torch.nan, torch.inf
    after = ops.downsample_add_rms_norm(x, residual, weight, stage)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_threads_agree() -> None:
    stage = image_stage(2)
    x, residual, weight = drawn(stage.num_tokens_in, 1024, torch.bfloat16)
    threads, outs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs.append(ops.downsample_add_rms_norm(x, residual, weight, stage)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


STAGE = stage_of([[0, 0, 2, 2, 0, 0], [2, 2, 5, 3, 0, 1]], 5, 7)


@pytest.mark.parametrize("keep_indices", [None, torch.tensor([6, 0, 0])])
def test_gradcheck(keep_indices: Tensor | None) -> None:
    x, residual, weight = (t.requires_grad_() for t in drawn(7, 4, torch.float64))
    stage = STAGE if keep_indices is None else None

    def op(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return ops.downsample_add_rms_norm(x, residual, weight, stage, keep_indices=keep_indices)

    assert torch.autograd.gradcheck(op, (x, residual, weight))
    assert torch.autograd.gradgradcheck(op, (x, residual, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_close_to_pytorchs(dtype: torch.dtype) -> None:
    """The same through PyTorch's own ops in float64; dropped rows exactly 0."""
    stage = image_stage()
    rows = torch.tensor(reference.source_rows(stage))
    inputs = [t.requires_grad_() for t in drawn(stage.num_tokens_in, 64, dtype)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    grads = drawn(stage.num_tokens, 64, dtype)[:2]

    torch.autograd.backward(ops.downsample_add_rms_norm(*inputs, stage), grads)
    h = wide[0][rows] + wide[1][rows]
    normed = torch.nn.functional.rms_norm(h, (64,), wide[2], 1e-6)
    torch.autograd.backward([normed, h], [g.double() for g in grads])
    tolerance = {
        torch.float64: 1e-12,
        torch.float32: 1e-5,
        torch.float16: 6e-3,
        torch.bfloat16: 5e-2,
    }
    for mine, truth in zip(inputs, wide, strict=True):
        assert mine.grad is not None
        assert truth.grad is not None
        assert mine.grad.dtype == dtype
        worst = (mine.grad.double() - truth.grad).abs().max() / truth.grad.abs().max()
        assert worst < tolerance[dtype]
    dropped = torch.ones(stage.num_tokens_in, dtype=torch.bool)
    dropped[rows] = False
    assert inputs[0].grad is not None
    assert not inputs[0].grad[dropped].any()


X = torch.zeros(7, 4)
W = torch.ones(4)
Call = Callable[..., object]


def call(x: object = X, residual: object = X, weight: object = W, **options: object) -> Call:
    options = {"stage": STAGE, **options}
    return lambda: ops.downsample_add_rms_norm(x, residual, weight, **options)  # type: ignore[arg-type]


E4M3 = X.to(torch.float8_e4m3fn)
BAD_CALLS = {
    "fp8": (call(E4M3, E4M3, W.to(torch.float8_e4m3fn)), TypeError, "^x: .*float16, got torch.float8_e4m3fn"),
    "int": (call(X.int(), X.int(), W.int()), TypeError, "^x: .*got torch.int32"),
    "complex": (call(X + 0j, X + 0j, W + 0j), TypeError, "^x: .*got torch.complex64"),
    "x not a tensor": (call(1.0), TypeError, "^x: .*float"),
    "x one dimension": (call(X[:, 0].clone()), ValueError, r"^x: expected shape \[rows, hidden\]"),
    "x three dimensions": (call(X[None].expand(7, -1, -1).clone()), ValueError, r"^x: .*\(7, 7, 4\)"),
    "x strides": (call(torch.zeros(4, 7).T), ValueError, "^x: .*contiguous inside"),
    "residual dtype": (call(residual=X.double()), TypeError, "^residual: .*float32, got torch.float64"),
    "residual shape": (call(residual=X[:, :3].clone()), ValueError, r"^residual: .*\(7, 4\), got \(7, 3\)"),
    "residual device": (call(residual=X.to("meta")), ValueError, "^residual: .*cpu, got meta"),
    "residual strides": (call(residual=torch.zeros(4, 7).T), ValueError, "^residual: .*contiguous inside"),
    "weight not a tensor": (call(weight=None), TypeError, "^weight: .*NoneType"),
    "weight length": (call(weight=W[:3].clone()), ValueError, r"^weight: .*\(4,\), got \(3,\)"),
    "weight dtype": (call(weight=W.double()), TypeError, "^weight: .*float32, got torch.float64"),
    "weight strides": (call(weight=torch.ones(8)[::2]), ValueError, "^weight: .*contiguous"),
    "weight device": (call(weight=W.to("meta")), ValueError, "^weight: .*cpu, got meta"),
    "eps": (call(eps=-1.0), ValueError, "^eps: .*-1"),
    "eps nan": (call(eps=float("nan")), ValueError, "^eps: .*nan"),
    "rows": (call(X[:6], X[:6]), ValueError, "^x: expected 7 rows"),
    "table": (call(stage=stage_of([[0, 3, 5, 5, 0, 0]], 5, 7)), ValueError, "^segments: row 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name: str) -> None:
    bad_call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        bad_call()


def test_the_op_itself_checks_too() -> None:
    op = torch.ops.adsc_kernels.downsample_add_rms_norm
    table = STAGE.segments
    for x, residual, weight, eps, message in [
        (X[0], X, W, 0.0, "^x: .*hidden"),
        (X, X[:6], W, 0.0, r"^residual: .*\[7, 4\], got \[6, 4\]"),
        (X, X.double(), W, 0.0, "^residual: .*dtype"),
        (X, X, W[:3], 0.0, r"^weight: .*\[4\], got shape \[3\]"),
        (X, X, W.half(), 0.0, "^weight: .*dtype"),
        (X + 0j, X + 0j, W + 0j, 0.0, "^x: .*float32"),
        (X.int(), X.int(), W.int(), 0.0, "^x: .*float32"),
        (X, X, W, -1.0, "^eps: "),
    ]:
        with pytest.raises(ValueError, match=message):
            op(x, residual, weight, table, None, 5, eps)
