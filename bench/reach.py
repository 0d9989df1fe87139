"""What the GPU kernels ought to reach, held against a bench's report.

    python bench/reach.py gpu-bench.json      (make gpu-bench prints the same)

Bounds are on times in a CUDA graph, but for those of the host, which are on the time until a call
returns. An op is held to a share of the plain copy from 100 MiB moved on: below that a launch
weighs more than the bytes, and one prompt's rows have a bound of their own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from table_gpu import NO_COPY, cases_of, copy_us, table

Case = dict[str, Any]

LARGE = 100 << 20  # bytes moved
ONE_PROMPT = "batch 1, hidden 4096"
# Times of a plain copy that one prompt's rows may take.
OF_ONE = {"downsample": 1.16, "downsample_add_rms_norm": 1.2, "boundary_step": 1.16}
METADATA_US = {"32 sequences": 3.0, "8192 sequences": 12.0}
HOST_US = {"boundary_step": 25.0, "compact_kv_": 60.0, "compact_paged_kv_": 60.0}


@dataclass(frozen=True)
class Bound:
    """`got` should be at most `most`, both in µs."""

    what: str
    case: str
    most: float
    got: float

    @property
    def over(self) -> float:
        """By which part it is missed; below 0 where it is kept."""
        return self.got / self.most - 1


def named(case: Case) -> str:
    return f"{case['op']}, {case['case']}"


def kernel_bounds(case: Case) -> Iterator[Bound]:
    op, times = case["op"], case["times"]
    ours = times["cuda"]["graph_us"]

    def beside(what: str, names: tuple[str, ...], most: float = 1.0) -> Iterator[Bound]:
        found = [times[name]["graph_us"] for name in names if "graph_us" in times.get(name, {})]
        if found:
            yield Bound(f"at most {what}", named(case), most * min(found), ours)

    if op == "downsample":
        given = ("cuda by int32 rows", "gather kernel")
        yield from beside("1.03 × a gather of given rows", given, 1.03)
        yield from beside("index_select", ("eager",))
        yield from beside("Triton", ("triton",))
    if op in ("downsample_add_rms_norm", "boundary_step"):
        yield from beside("torch.compile", ("eager compiled",))
    if op == "rebuild_metadata" and case["case"] in METADATA_US:
        most = METADATA_US[case["case"]]
        yield Bound(f"at most {most} µs", named(case), most, ours)
    if op not in NO_COPY:
        yield from copy_bounds(case, ours)


def copy_bounds(case: Case, ours: float) -> Iterator[Bound]:
    op, copy = case["op"], copy_us(case)
    if op.startswith("compact"):
        share = 0.90 if ", batch 1," in case["case"] else 0.93
        yield Bound(f"at least {share} of the copy", named(case), copy / share, ours)
    elif op in OF_ONE:
        if case["case"].startswith(ONE_PROMPT):
            yield Bound(f"at most {OF_ONE[op]} × the copy", named(case), OF_ONE[op] * copy, ours)
        elif case["bytes_moved"] >= LARGE:
            yield Bound("at least 0.96 of the copy", named(case), copy / 0.96, ours)


def host_bounds(case: Case) -> Iterator[Bound]:
    op, times = case["op"], case["times"]
    host = {name: t["host_us"] for name, t in times.items() if "host_us" in t}
    if "cuda" not in host:
        return
    if op == "downsample" and "eager" in host:
        yield Bound("host: at most index_select", named(case), host["eager"], host["cuda"])
    if op in HOST_US and "4 layers" not in case["case"]:
        most = HOST_US[op]
        yield Bound(f"host: at most {most:.0f} µs", named(case), most, host["cuda"])
    if "triton" in host:
        most = 2.5 * host["cuda"]
        yield Bound("host: Triton at most 2.5 × CUDA", named(case), most, host["triton"])


def step_bounds(cases: list[Case]) -> Iterator[Bound]:
    """compress_step takes no longer than the two ops that it joins, on the device and the host."""
    found = {(case["op"], case["case"]): case["times"].get("cuda", {}) for case in cases}
    for (op, name), ours in found.items():
        parts = found.get(("boundary_step, then compact_kv_", name), {})
        for kind, prefix in (("graph_us", ""), ("host_us", "host: ")):
            if op == "compress_step" and kind in ours and kind in parts:
                what = f"{prefix}at most its two ops"
                yield Bound(what, f"{op}, {name}", parts[kind], ours[kind])


def bounds(cases: list[Case]) -> list[Bound]:
    """All that the measured cases allow to say."""
    ran = [case for case in cases if "graph_us" in case["times"].get("cuda", {})]
    found = [bound for case in ran for bound in kernel_bounds(case)]
    found += step_bounds(ran)
    return found + [bound for case in ran for bound in host_bounds(case)]


def summary(cases: list[Case]) -> str:
    """A line for each bound: kept in so many cases, and the cases that miss it."""
    by_what: dict[tuple[str, str], list[Bound]] = {}
    for bound in bounds(cases):
        by_what.setdefault((bound.case.partition(", ")[0], bound.what), []).append(bound)
    rows = []
    for (op, what), found in by_what.items():
        missed = sorted((b for b in found if b.over > 0), key=lambda bound: -bound.over)
        said = [
            f"{b.case.partition(', ')[2]}: {b.got:.1f} µs, {100 * b.over:.0f} % over"
            for b in missed
        ]
        rows.append(
            [f"`{op}`", what, f"{len(found) - len(missed)} of {len(found)}", "; ".join(said)]
        )
    return table(["op", "bound", "kept", "missed by"], rows)


if __name__ == "__main__":
    print(summary(cases_of(json.loads(Path(sys.argv[1]).read_text())["jobs"])))
