"""downsample and downsample_many against the reference, bit for bit."""
# ruff: noqa: E501 (tables of cases, one a line)

from dataclasses import replace

import pytest
import torch
from cases.row_bits import DTYPES, STRIDES, TRAILING, bits, random_bits, same_bits, strided_rows
from cases.segment_tables import FakeStage, image_stage, stage_of, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels import ops, reference


@settings(max_examples=300, deadline=None)
@given(
    stage=stages(),
    dtype=st.sampled_from(DTYPES),
    trailing=st.sampled_from(TRAILING),
    kind=st.sampled_from(STRIDES),
    seed=st.integers(0, 2**31),
)
def test_equals_reference(
    stage: FakeStage, dtype: torch.dtype, trailing: tuple[int, ...], kind: str, seed: int
) -> None:
    x = strided_rows(random_bits(stage.num_tokens_in, trailing, dtype, seed), kind)
    before, table = bits(x).clone(), stage.segments.clone()
    out = ops.downsample(x, stage)
    assert out.is_contiguous()
    assert same_bits(out, reference.downsample(x, stage))
    assert torch.equal(bits(x), before)
    assert torch.equal(stage.segments, table)

    rows = torch.tensor(reference.source_rows(stage), dtype=torch.int64)
    for width in (torch.int32, torch.int64):
        assert same_bits(ops.downsample(x, keep_indices=rows.to(width)), out)


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
    outs = ops.downsample_many(xs, stage)
    wanted = reference.downsample_many(xs, stage)
    rows = torch.tensor(reference.source_rows(stage), dtype=torch.int32)
    again = ops.downsample_many(tuple(xs), keep_indices=rows)
    assert isinstance(outs, list)
    assert len(outs) == len(again) == len(xs)
    for x, out, out_again, reference_out in zip(xs, outs, again, wanted, strict=True):
        assert same_bits(out, reference_out)
        assert same_bits(out_again, reference_out)
        assert same_bits(out, ops.downsample(x, stage))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("trailing", [(), (4096,)], ids=["positions", "hidden"])
def test_threads(threads: int, trailing: tuple[int, ...]) -> None:
    """Large enough to be shared between threads, which meet inside a segment."""
    stage = image_stage(60 if trailing == () else 2, text=1001)
    x = random_bits(stage.num_tokens_in, trailing, torch.int64, 1)
    rows = torch.tensor(reference.source_rows(stage))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = ops.downsample(x, stage)
        assert torch.equal(out, x[rows])
        assert torch.equal(ops.downsample(x, keep_indices=rows), out)
    finally:
        torch.set_num_threads(before)


def test_conjugate_views_are_resolved() -> None:
    x = random_bits(6, (2,), torch.complex64, 3).nan_to_num()
    rows = torch.tensor([5, 0])
    assert torch.equal(ops.downsample(x.conj(), keep_indices=rows), x[rows].conj())


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
    """A stride that takes the last row past 2^32 bytes, of which only two rows are ever touched."""
    storage = torch.empty((1 << 32) + (1 << 20), dtype=torch.uint8)
    x = storage.as_strided((3, 8), (1 << 31, 1))
    x[0], x[2] = 1, 7
    assert ops.downsample(x, keep_indices=torch.tensor([2, 0]))[:, 0].tolist() == [7, 1]


# ---- Gradients --------------------------------------------------------------------------------------


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
    wanted[reference.source_rows(stage)] = grad
    assert x.grad is not None
    assert torch.equal(x.grad, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_duplicates_are_summed_in_float(dtype: torch.dtype) -> None:
    """257 ones overflow bfloat16's integers if they are added one by one in bfloat16."""
    x = torch.randn(3, 2, dtype=dtype, requires_grad=True)
    ops.downsample(x, keep_indices=torch.tensor([1] * 300 + [2])).sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [0, 300, 1]


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


# ---- Bad input --------------------------------------------------------------------------------------

X = torch.zeros(10, 4)
GOOD = stage_of([[0, 0, 10, 5, 0, 0]], 5, 10)


def with_table(rows: list[list[int]], num_tokens: int = 5) -> FakeStage:
    return stage_of(rows, num_tokens, 10)


BAD_CALLS = {
    "both": (lambda: ops.downsample(X, GOOD, keep_indices=torch.tensor([0])), ValueError, "exactly one"),
    "neither": (lambda: ops.downsample(X), ValueError, "got neither"),
    "x not a tensor": (lambda: ops.downsample([1, 2], GOOD), TypeError, "^x: .*list"),
    "x sparse": (lambda: ops.downsample(X.to_sparse(), GOOD), TypeError, "^x: .*sparse"),
    "x scalar": (lambda: ops.downsample(torch.tensor(1.0), GOOD), ValueError, "^x: .*scalar"),
    "x transposed": (lambda: ops.downsample(torch.zeros(4, 10).T, GOOD), ValueError, r"^x: .*contiguous inside.*\(1, 10\)"),
    "x rows": (lambda: ops.downsample(X[:9], GOOD), ValueError, "^x: expected 10 rows .*got 9"),
    "no tensors": (lambda: ops.downsample_many([], GOOD), ValueError, "^xs: .*at least one"),
    "rows differ": (lambda: ops.downsample_many([X, X[:9]], GOOD), ValueError, r"^xs\[1\]: expected 10 rows"),
    "devices differ": (lambda: ops.downsample_many([X, X.to("meta")], GOOD), ValueError, r"^xs\[1\]: .*device"),
    "table device": (lambda: ops.downsample(X, replace(GOOD, segments=GOOD.segments.to("meta"))), ValueError, "^stage.segments: .*device.*meta"),
    "table dtype": (lambda: ops.downsample(X, replace(GOOD, segments=GOOD.segments.long())), TypeError, "^stage.segments: .*int32.*int64"),
    "table shape": (lambda: ops.downsample(X, replace(GOOD, segments=GOOD.segments[:, :5].clone())), ValueError, r"^stage.segments: .*\[S, 6\].*\(1, 5\)"),
    "table strides": (lambda: ops.downsample(X, replace(GOOD, segments=torch.zeros(6, 2, dtype=torch.int32).T)), ValueError, "^stage.segments: .*contiguous"),
    "table not a tensor": (lambda: ops.downsample(X, replace(GOOD, segments=[[0] * 6])), TypeError, "^stage.segments: .*list"),
    "table empty": (lambda: ops.downsample(X, with_table([])), ValueError, "^segments: .*5 output rows.*empty"),
    "first dst": (lambda: ops.downsample(X, with_table([[1, 0, 10, 5, 0, 0]])), ValueError, "^segments: .*first dst.*got 1"),
    "dst falls": (lambda: ops.downsample(X, with_table([[0, 0, 10, 9, 0, 0], [4, 0, 9, 9, 0, 0], [3, 0, 9, 9, 0, 0]])), ValueError, "^segments: row 1 .*rising.*got 3"),
    "dst past the end": (lambda: ops.downsample(X, with_table([[0, 0, 9, 9, 0, 0], [6, 0, 9, 9, 0, 0]])), ValueError, "^segments: row 0 .*num_tokens, 5, got up to 6"),
    "too few kept": (lambda: ops.downsample(X, with_table([[0, 0, 10, 4, 0, 0]])), ValueError, "^segments: row 0 .*5 output rows"),
    "first too large": (lambda: ops.downsample(X, with_table([[0, 0, 10, 5, 1, 0]])), ValueError, "^segments: row 0 .*first 1.*5 output rows"),
    "first negative": (lambda: ops.downsample(X, with_table([[0, 0, 10, 5, -1, 0]])), ValueError, "^segments: row 0 .*first -1"),
    "keep past span": (lambda: ops.downsample(X, with_table([[0, 0, 5, 6, 0, 0]])), ValueError, "^segments: row 0 .*keep <= span"),
    "keep zero": (lambda: ops.downsample(X, with_table([[0, 0, 5, 0, 0, 0]])), ValueError, "^segments: row 0 .*1 <= keep"),
    "pattern": (lambda: ops.downsample(X, with_table([[0, 0, 10, 5, 0, 3]])), ValueError, "^segments: row 0 .*pattern 0, 1 or 2"),
    "source before x": (lambda: ops.downsample(X, with_table([[0, -1, 10, 5, 0, 0]])), ValueError, r"^segments: row 0 .*\[0, 10\), got -1 to 7"),
    "source past x": (lambda: ops.downsample(X, with_table([[0, 2, 10, 5, 0, 0]])), ValueError, r"^segments: row 0 .*\[0, 10\), got 2 to 10"),
    "num_tokens": (lambda: ops.downsample(X, replace(GOOD, num_tokens=6)), ValueError, "^segments: row 0 .*6 output rows"),
    "num_tokens negative": (lambda: ops.downsample(X, replace(GOOD, num_tokens=-1)), ValueError, "^num_tokens: .*-1"),
    "indices dtype": (lambda: ops.downsample(X, keep_indices=torch.tensor([1.0])), TypeError, "^keep_indices: .*float32"),
    "indices mask": (lambda: ops.downsample(X, keep_indices=torch.ones(10, dtype=torch.bool)), TypeError, "^keep_indices: .*bool"),
    "indices list": (lambda: ops.downsample(X, keep_indices=[1]), TypeError, "^keep_indices: .*list"),
    "indices shape": (lambda: ops.downsample(X, keep_indices=torch.tensor([[1]])), ValueError, r"^keep_indices: .*\[rows\].*\(1, 1\)"),
    "indices strides": (lambda: ops.downsample(X, keep_indices=torch.arange(10)[::2]), ValueError, "^keep_indices: .*contiguous"),
    "index negative": (lambda: ops.downsample(X, keep_indices=torch.tensor([0, -1])), ValueError, r"^keep_indices: .*\[0, 10\), got -1 at position 1"),
    "index past x": (lambda: ops.downsample(X, keep_indices=torch.tensor([9, 10, 0], dtype=torch.int32)), ValueError, r"^keep_indices: .*got 10 at position 1"),
    "index huge": (lambda: ops.downsample(X, keep_indices=torch.tensor([0, -(2**63)])), ValueError, "^keep_indices: .*position 1"),
    "index into nothing": (lambda: ops.downsample(X[:0], keep_indices=torch.tensor([0])), ValueError, r"^keep_indices: .*\[0, 0\), got 0"),
}  # fmt: skip


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
        with pytest.raises(ValueError, match=message):
            op(*arguments)


def test_empty_everything() -> None:
    nothing = stage_of([], 0, 0)
    assert ops.downsample(torch.empty(0, 3), nothing).shape == (0, 3)
    all_dropped = stage_of([[0, 0, 10, 0, 0, 0]], 0, 10)
    assert ops.downsample(X, all_dropped).shape == (0, 4)
    assert ops.downsample(X, keep_indices=torch.empty(0, dtype=torch.int64)).shape == (0, 4)
