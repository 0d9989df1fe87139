"""The GPU benches: of each family of ops the telling cases, or the rest.

    python bench/gpu_bench.py FILE telling|rest UNTIL      (make gpu-bench runs both)

The telling cases come without torch.compile, which takes seconds for each; among the rest those
come again that are compiled too. The rest takes turns between the families, most telling first, so
that a cut-off leaves out of each what tells least. Writes JSON to FILE after each case; none begins
when time.monotonic() is past UNTIL.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import gpu_boundary
import gpu_compact
import gpu_compress
import gpu_downsample
from gpu_timing import Case, measure_all

FAMILIES = (gpu_downsample, gpu_boundary, gpu_compact, gpu_compress)


def telling() -> Iterator[Case]:
    for family in FAMILIES:
        yield from (case for case in family.cases() if case.telling)


def rest() -> Iterator[Case]:
    families = [
        (case for case in family.cases() if case.compiled or not case.telling)
        for family in FAMILIES
    ]
    for round_of in itertools.zip_longest(*families):
        yield from (case for case in round_of if case is not None)


if __name__ == "__main__":
    file, part, until = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    cases = telling() if part == "telling" else rest()
    sys.exit(measure_all(cases, file, until, compiled=part == "rest"))
