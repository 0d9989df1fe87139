"""Arguments of rebuild_metadata."""
# ruff: noqa: E501 (tables of cases, one a line)

from cases.rebuild_metadata import int32

CU = int32([0, 10, 16], 3)
SPANS = int32([[0, 1, 4], [0, 5, 3], [1, 0, 6]], 3, 3)
GRID = int32([[0, 1, 4, 2, 2], [1, 0, 6, 2, 3]], 2, 5)


def bad_spans(*rows: list[int]) -> tuple[object, ...]:
    return (CU, int32(rows, len(rows), len(rows[0])), "1/2")


BAD_CALLS = {
    "cu_seqlens list": (([0, 10], SPANS, 1), TypeError, "^cu_seqlens: .*list"),
    "cu_seqlens int64": ((CU.long(), SPANS, 1), TypeError, "^cu_seqlens: .*int32, got torch.int64"),
    "cu_seqlens shape": ((CU[None], SPANS, 1), ValueError, r"^cu_seqlens: .*\(1, 3\)"),
    "cu_seqlens empty": ((CU[:0], SPANS, 1), ValueError, r"^cu_seqlens: .*\(0,\)"),
    "cu_seqlens strides": ((CU[::2], SPANS, 1), ValueError, "^cu_seqlens: .*contiguous"),
    "cu_seqlens first": ((CU + 1, SPANS, 1), ValueError, "^cu_seqlens: expected 0 first, got 1"),
    "cu_seqlens falls": ((int32([0, 10, 9], 3), SPANS[:2], 1), ValueError, "^cu_seqlens: .*got 9 after 10"),
    "spans dtype": ((CU, SPANS.float(), 1), TypeError, "^spans: .*float32"),
    "spans shape": ((CU, SPANS[:, :2].clone(), 1), ValueError, r"^spans: .*\(3, 2\)"),
    "spans strides": ((CU, GRID[:, :3], 1), ValueError, "^spans: .*contiguous"),
    "spans device": ((CU, SPANS.to("meta"), 1), ValueError, "^spans: .*device.*cpu, got meta"),
    "spans sequence": (bad_spans([2, 0, 1]), ValueError, r"^spans: row 0 \(sequence 2, .*\[0, 2\)"),
    "spans negative sequence": (bad_spans([-1, 0, 1]), ValueError, r"^spans: row 0 .*\[0, 2\)"),
    "spans order": (bad_spans([1, 0, 1], [0, 0, 1]), ValueError, "^spans: row 1 .*in order"),
    "spans overlap": (bad_spans([0, 0, 5], [0, 4, 2]), ValueError, "^spans: row 1 .*at least 5"),
    "spans start": (bad_spans([0, -1, 2]), ValueError, "^spans: row 0 .*at least 0"),
    "spans length": (bad_spans([0, 3, -1]), ValueError, "^spans: row 0 .*length"),
    "spans leave": (bad_spans([1, 3, 4]), ValueError, "^spans: row 0 .*sequence's 6"),
    "spans size": (bad_spans([0, 0, 4, 2, 3]), ValueError, "^spans: row 0 .*2 x 3"),
    "spans height": ((CU, GRID, (1, 1), "grid", 1), ValueError, "^spans: row 0 .*max_height, got 2"),
    "spans of three for the grid": ((CU, SPANS, (1, 1), "grid", 2), ValueError, r"^spans: .*\[N, 5\]"),
    "keep above": ((CU, SPANS, "3/2"), ValueError, r"^keep: .*\[0, 1\], got '3/2'"),
    "keep below": ((CU, SPANS, (-1, 2)), ValueError, "^keep: "),
    "keep float": ((CU, SPANS, 0.3), TypeError, "^keep: .*got 0.3"),
    "keep words": ((CU, SPANS, "half"), ValueError, "^keep: .*'half'"),
    "keep over zero": ((CU, SPANS, (1, 0)), ValueError, r"^keep: .*\(1, 0\)"),
    "keep none": ((CU, SPANS, None), TypeError, "^keep: .*None"),
    "keep too fine": ((CU, SPANS, (1, 1 << 31)), ValueError, "^keep: "),
    "keep single for the grid": ((CU, GRID, "1/2", "grid", 2), TypeError, "^keep: .*pair"),
    "pattern": ((CU, SPANS, 1, "random"), ValueError, "^pattern: .*'start', 'center', 'linspace' or 'grid', got 'random'"),
    "max_height missing": ((CU, GRID, (1, 1), "grid"), TypeError, "^max_height: expected an int, got None"),
    "max_height negative": ((CU, GRID, (1, 1), "grid", -1), ValueError, "^max_height: .*-1"),
    "max_height unasked": ((CU, SPANS, 1, "start", 2), ValueError, "^max_height: expected None"),
}  # fmt: skip
