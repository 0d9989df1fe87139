# mypy: allow-untyped-defs, allow-incomplete-defs
"""The keep rule and the segment lookup on the device: the twin of csrc/segment.h.

Arguments are scalars or tensors of integers. Results are int64: products reach 2^62.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from adsc_kernels import segment_table

COLUMNS = tl.constexpr(len(segment_table.COLUMNS))
START = tl.constexpr(segment_table.PATTERN_CODES["start"])
CENTER = tl.constexpr(segment_table.PATTERN_CODES["center"])
LINSPACE = tl.constexpr(segment_table.PATTERN_CODES["linspace"])


@triton.jit
def kept_count(n, numerator, denominator):
    """m = ceil(n * numerator / denominator)."""
    return (tl.cast(n, tl.int64) * numerator + denominator - 1) // denominator


@triton.jit
def kept_index(pattern, j, n, m):
    """The index, in [0, n), of number j of the m rows that stay: (offset + j * step) // divisor."""
    j = tl.cast(j, tl.int64)
    n = tl.cast(n, tl.int64)
    m = tl.cast(m, tl.int64)
    center = pattern == CENTER
    linspace = pattern == LINSPACE
    offset = tl.where(center, n, tl.where(linspace, m - 1, 0))
    step = tl.where(center, 2 * n, tl.where(linspace, 2 * (n - 1), n))
    divisor = tl.where(center, 2 * m, tl.where(linspace, 2 * (m - 1), m))
    return (offset + j * step) // tl.maximum(divisor, 1)  # 0 where nothing or one row stays


@triton.jit
def find_segment(table, num_segments, steps, row):
    """The last segment whose dst is at most row, of num_segments (at least 1) sorted by dst.

    steps: such that 2^steps >= num_segments. Empty segments share their dst with the next one.
    """
    low = tl.cast(row * 0, tl.int32)
    high = low + num_segments
    for _ in range(steps):  # dst[low] <= row < dst[high]; once they are neighbours, nothing changes
        middle = (low + high) // 2
        below = tl.load(table + middle.to(tl.int64) * COLUMNS) <= row
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def segment_source(table, num_segments, steps, row):
    """The source row of an output row, and whether it has one.

    It has none past the last row that the table moves, which a stage may have where the number of
    its rows is an upper bound.
    """
    segment = table + find_segment(table, num_segments, steps, row).to(tl.int64) * COLUMNS
    dst = tl.load(segment).to(tl.int64)
    src = tl.load(segment + 1).to(tl.int64)
    span = tl.load(segment + 2)
    keep = tl.load(segment + 3)
    number = tl.load(segment + 4) + row - dst
    pattern = tl.load(segment + 5)
    return src + kept_index(pattern, number, span, keep), number < keep


class RowMap(NamedTuple):
    """Which source row each output row takes.

    Kernels take the fields one by one and put them together: Triton compiles anew for the values in
    a tuple, and not for those of an argument named in ROW_MAP.
    """

    rows: Any  # a segment table or, BY_INDEX, a list of num_tokens source rows
    num_segments: Any
    steps: Any  # of a binary search over the segments
    num_tokens: Any  # output rows
    num_rows: Any  # source rows
    BY_INDEX: Any


ROW_MAP = [*RowMap._fields[:-1]]  # what differs from batch to batch: the code is the same for all


@triton.jit
def source_rows(row_map, row, CHECK: tl.constexpr):
    """The source rows (int64) of the output rows `row`, and which of them have one.

    CHECK: stop the program with a message where the source lies outside of [0, num_rows).
    """
    wanted = row < row_map.num_tokens
    if row_map.BY_INDEX:
        source = tl.load(row_map.rows + row, mask=wanted, other=0).to(tl.int64)
        found = wanted
        if CHECK:
            ok = (source >= 0) & (source < row_map.num_rows) | ~wanted
            tl.device_assert(ok, "keep_indices: a value outside of the rows of x")
    else:
        source, found = segment_source(row_map.rows, row_map.num_segments, row_map.steps, row)
        if CHECK:
            ok = found & (source >= 0) & (source < row_map.num_rows) | ~wanted
            tl.device_assert(ok, "segments: an output row without a source row in x")
            number = find_segment(row_map.rows, row_map.num_segments, row_map.steps, row)
            pattern = tl.load(row_map.rows + number.to(tl.int64) * COLUMNS + 5)
            ok = (pattern >= 0) & (pattern <= LINSPACE) | ~wanted
            tl.device_assert(ok, "segments: a pattern that there isn't")
        found = found & wanted
    if CHECK:
        found = found & (source >= 0) & (source < row_map.num_rows)
    return source, found
