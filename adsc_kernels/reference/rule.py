"""The keep rule, and the rows that a segment table names: the twin of csrc/segment.h."""

from fractions import Fraction

from torch import Tensor

from adsc_kernels.segment_table import PATTERN_CODES

PATTERNS = tuple(name for name in PATTERN_CODES if name != "grid")  # by code


def kept_count(n: int, keep: Fraction) -> int:
    """How many of n rows stay: n * keep, rounded up."""
    return -((-n * keep.numerator) // keep.denominator)


def aligned_kept_count(n: int, kept: int, block: int) -> int:
    """The least count from `kept` up that leaves a multiple of `block` of n rows to drop."""
    while (n - kept) % block:
        kept += 1
    return kept


def kept_index(pattern: str, j: int, n: int, m: int) -> int:
    """The index, in [0, n), of number j of the m rows that stay."""
    if pattern == "start":
        return (j * n) // m
    if pattern == "center":
        return ((2 * j + 1) * n) // (2 * m)
    if m == 1:
        return 0
    return (2 * j * (n - 1) + (m - 1)) // (2 * (m - 1))  # round_half_up(j * (n - 1) / (m - 1))


def kept_before(pattern: str, x: int, n: int, m: int) -> int:
    """How many of the m rows that stay lie below index x."""
    return sum(kept_index(pattern, j, n, m) < x for j in range(m))


def source_rows(segments: Tensor | None, keep_indices: Tensor | None, num_tokens: int) -> list[int]:
    """The source row of every output row.

    Raises ValueError where the table does not say it for every output row.
    """
    if segments is None:
        assert keep_indices is not None
        return keep_indices.tolist()
    table = segments.tolist()
    ends = [row[0] for row in table[1:]] + [num_tokens]
    rows: list[int] = []
    for (dst, src, span, keep, first, pattern), end in zip(table, ends, strict=False):
        if dst != len(rows):
            raise ValueError(f"segments: expected dst {len(rows)} next, got {dst}")
        for j in range(first, first + end - dst):
            if not 0 <= j < keep <= span:
                raise ValueError(f"segments: kept row {j} of {keep} of a span of {span}")
            rows.append(src + kept_index(PATTERNS[pattern], j, span, keep))
    if len(rows) != num_tokens:
        raise ValueError(f"segments: expected {num_tokens} output rows, got {len(rows)}")
    return rows
