"""Numbers and tables as text."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns under a header: the first ``left`` of them flush left, the others flush right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[c]) for line in lines) for c in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if c < left else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def in_bytes(count: int) -> str:
    """``1.50 MiB``; small counts in KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 2**10:.1f} KiB"


def in_macs(count: int) -> str:
    """``4.504 T``, ``12.34 G``, ``1.5 M`` or ``1.6 k`` multiply-accumulates."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count / 1e3:.4g} k"


def in_time(seconds: float | None) -> str:
    """Milliseconds, or ``-`` for what was not measured."""
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


def saved(before: float, after: float) -> str:
    """How much less ``after`` is: ``56.7 %``; negative where it is more."""
    return f"{100 * share_saved(before, after):.1f} %"


def share_saved(before: float, after: float) -> float:
    """``1 - after / before``; 0 where there was nothing to save."""
    return 1 - after / before if before else 0.0


def layer_range(layers: range) -> str:
    """``4-7``, ``4`` or ``none``."""
    if len(layers) < 2:
        return str(layers.start) if layers else "none"
    return f"{layers.start}-{layers.stop - 1}"


def verdict(right: bool) -> str:
    """A tick or a cross, where the terminal's encoding has them."""
    mark, plain = ("\N{CHECK MARK}", "ok") if right else ("\N{BALLOT X}", "wrong")
    try:
        mark.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return plain
    return mark
