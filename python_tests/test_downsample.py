"""downsample and downsample_many against the reference, bit for bit."""

import pytest
import torch
from cases.downsample import (
    Rows,
    check,
    check_conjugate_views,
    check_duplicates,
    check_many,
    check_no_rows,
    check_rows_far_apart,
    drawn_rows,
)
from cases.refused import BY_THE_OP
from cases.refused.downsample import BAD_CALLS, GOOD, X
from cases.row_bits import DTYPES, STRIDES, TRAILING, random_bits, same_bits, strided_rows
from cases.run import on
from cases.segment_tables import FakeStage, image_stage, source_rows, stage_of, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels import ops


@settings(max_examples=300, deadline=None)
@given(stage=stages(), rows=drawn_rows())
def test_equals_reference(stage: FakeStage, rows: Rows) -> None:
    check(stage, rows.make(stage.num_tokens_in), on("cpu"))


@settings(max_examples=100, deadline=None)
@given(
    indices=st.lists(st.integers(0, 12), max_size=40),
    width=st.sampled_from([torch.int32, torch.int64]),
    trailing=st.sampled_from(TRAILING),
)
def test_indices_in_any_order(
    indices: list[int], width: torch.dtype, trailing: tuple[int, ...]
) -> None:
    x = random_bits(13, trailing, torch.float32, 0)
    rows = torch.tensor(indices, dtype=width)
    assert same_bits(ops.downsample(x, keep_indices=rows), x[rows.long()])


@settings(max_examples=100, deadline=None)
@given(stage=stages(), kinds=st.lists(st.sampled_from(STRIDES), min_size=1, max_size=5))
def test_many_equals_one_by_one(stage: FakeStage, kinds: list[str]) -> None:
    xs = [
        strided_rows(random_bits(stage.num_tokens_in, TRAILING[i], DTYPES[3 * i], i), kind)
        for i, kind in enumerate(kinds)
    ]
    check_many(stage, xs, on("cpu"))
    for x, out in zip(xs, ops.downsample_many(xs, stage), strict=True):
        assert same_bits(out, ops.downsample(x, stage))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("trailing", [(), (4096,)], ids=["positions", "hidden"])
def test_threads(threads: int, trailing: tuple[int, ...]) -> None:
    """Large enough to be shared between threads, which meet inside a segment."""
    stage = image_stage(60 if trailing == () else 2, text=1001)
    x = random_bits(stage.num_tokens_in, trailing, torch.int64, 1)
    rows = torch.tensor(source_rows(stage))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = ops.downsample(x, stage)
        assert torch.equal(out, x[rows])
        assert torch.equal(ops.downsample(x, keep_indices=rows), out)
    finally:
        torch.set_num_threads(before)


def test_conjugate_views_are_resolved() -> None:
    check_conjugate_views(on("cpu"))


def test_more_than_two_to_the_31_elements() -> None:
    """Byte offsets past 2^32 in the source and past 2^31 in the output, over real memory."""
    width = 1 << 16
    num_rows = (1 << 31) // width + 64
    x = torch.zeros(num_rows, width, dtype=torch.uint8)
    marks = torch.arange(num_rows, dtype=torch.int32)
    x[:, -4:] = marks.view(torch.uint8).reshape(num_rows, 4)
    end = num_rows - 20  # the last segment starts past 2^31 in the output too
    table = [
        [0, 0, 40, 1, 0, 0],
        [1, 40, end - 40, end - 40, 0, 0],
        [end - 39, end, 20, 10, 0, 0],
    ]
    stage = stage_of(table, end - 29, num_rows)
    out = ops.downsample(x, stage)
    assert (end - 39) * width > 1 << 31
    kept = marks[[0, *range(40, end), *range(end, num_rows, 2)]]
    assert torch.equal(out[:, -4:].contiguous().view(torch.int32)[:, 0], kept)
    far = ops.downsample(x, keep_indices=torch.tensor([num_rows - 1, 0]))
    assert torch.equal(far, x[[num_rows - 1, 0]])


def test_rows_far_apart() -> None:
    check_rows_far_apart(on("cpu"))


# ---- Gradients ----


@settings(max_examples=10, deadline=None)
@given(stage=stages(max_sequences=2, max_length=8), trailing=st.sampled_from([(), (2,), (1, 2)]))
def test_gradcheck(stage: FakeStage, trailing: tuple[int, ...]) -> None:
    x = torch.randn(stage.num_tokens_in, *trailing, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.downsample(x, stage), x)
    assert torch.autograd.gradgradcheck(lambda x: ops.downsample(x, stage), x)


def test_gradcheck_with_duplicates_and_integers_in_the_list() -> None:
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    z = torch.randn(5, dtype=torch.complex128, requires_grad=True)
    positions = torch.arange(5)
    rows = torch.tensor([3, 3, 0, 1, 3])

    def moved(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x, _, z = ops.downsample_many([x, positions, z], keep_indices=rows)
        return x, z

    assert torch.autograd.gradcheck(moved, (x, z))
    assert torch.autograd.gradgradcheck(moved, (x, z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_dropped_rows_have_gradient_zero_exactly(dtype: torch.dtype) -> None:
    stage = image_stage(2)
    x = torch.randn(stage.num_tokens_in, 300, dtype=dtype, requires_grad=True)
    grad = torch.randn(stage.num_tokens, 300, dtype=dtype)
    ops.downsample(x, stage).backward(grad)
    wanted = torch.zeros_like(x)
    wanted[source_rows(stage)] = grad
    assert x.grad is not None
    assert torch.equal(x.grad, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_duplicates_are_summed_in_float(dtype: torch.dtype) -> None:
    check_duplicates(dtype, on("cpu"))


def test_gradient_only_where_asked() -> None:
    stage = image_stage()
    x = torch.randn(stage.num_tokens_in, 2)
    y = torch.randn(stage.num_tokens_in, 2, requires_grad=True)
    _, out_y = ops.downsample_many([x, y], stage)
    assert out_y.requires_grad
    out_y.sum().backward()
    assert x.grad is None
    with torch.no_grad():
        assert not ops.downsample(y, stage).requires_grad
    assert not ops.downsample(x, stage).requires_grad


# ---- Bad input ----


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()


def test_the_op_itself_checks_too() -> None:
    """torch.ops is public: the same holds for callers who skip the Python function."""
    op = torch.ops.adsc_kernels.downsample
    table = GOOD.segments
    rows = torch.tensor([0])
    for arguments, message in [
        ((X, table, rows, 1), "exactly one.*both"),
        ((X, None, None, 1), "exactly one.*neither"),
        ((X[0, 0], table, None, 5), "^x: .*scalar"),
        ((torch.zeros(4, 10).T, table, None, 5), "^x: .*contiguous inside"),
        ((X, table.long(), None, 5), "^segments: .*int32"),
        ((X, table[:, :4].clone(), None, 5), r"^segments: .*\[1, 4\]"),
        ((X, None, rows.float(), 1), "^keep_indices: .*int32 or int64"),
        ((X, None, rows, 2), "^keep_indices: expected 2"),
    ]:
        with pytest.raises(BY_THE_OP, match=message):
            op(*arguments)


def test_empty_everything() -> None:
    check_no_rows(on("cpu"))
