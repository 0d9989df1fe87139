# mypy: allow-untyped-defs, allow-incomplete-defs
"""Rows that a graph finds anew at each replay: by an address in memory, not by one it was given."""

import triton
import triton.language as tl


@triton.jit
def rows_at(place, like, BY_ADDRESS: tl.constexpr):
    """Where rows of like's type begin: at `place`, or at the multiple of 16 that lies there."""
    rows = place
    if BY_ADDRESS:
        rows = tl.load(place).to(tl.pointer_type(like.dtype.element_ty))
        rows = tl.multiple_of(rows, 16)
    return rows
