"""Calls of downsample and downsample_many, and the good arguments that they spoil."""
# ruff: noqa: E501 (tables of cases, one a line)

from dataclasses import replace

import torch

from adsc_kernels import ops
from cases.segment_tables import FakeStage, stage_of

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
