"""What a GPU target prints last: short tables of its results, and what it left out."""

from __future__ import annotations

import sys
from typing import Any

from gpu_run import ROOT

sys.path.append(str(ROOT / "bench"))
from reach import summary
from table_gpu import cases_of


def table(rows: list[list[object]]) -> str:
    """Columns under each other; the first row is the heading."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def print_tests(results: list[dict[str, Any]]) -> None:
    for job in results:
        for failure in job.get("failures", []):
            print(f"FAILED {failure['test']} [{job['name']}]: {failure['message'][:200]}")
        for reason, count in job.get("skipped", {}).items():
            print(f"skipped {count} [{job['name']}]: {reason}")
    rows: list[list[object]] = [["file, backend", "passed", "failed", "skipped", "s", ""]]
    for job in results:
        skipped = sum(job.get("skipped", {}).values())
        counts = [job.get("passed", 0), job.get("failed", 0), skipped, job.get("seconds", "-")]
        rows.append([job["name"], *counts, job.get("error", "" if job["ok"] else "failed")])
    print(table(rows))


def print_sanitizers(results: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [["tool, backend", "calls", "s", "summary"]]
    for job in results:
        said = job.get("error") or job.get("summary", "")
        rows.append([job["name"], job.get("calls", 0), job.get("seconds", "-"), said])
    print(table(rows))


def print_benches(results: list[dict[str, Any]]) -> None:
    """Microseconds in a CUDA graph; from Python; of the host alone."""
    for job in results:
        if job.get("error"):
            print(f"{job['name']}: {job['error']}")
    rows: list[list[object]] = [
        ["op", "case", "of copy", "µs in a graph (from Python, host alone)"]
    ]
    cases = cases_of(results)
    for case in cases:
        times = [
            f"{name} {t['graph_us']:.1f} ({t['eager_us']:.1f}, {t['host_us']:.1f})"
            if "graph_us" in t
            else f"{name} !"
            for name, t in case["times"].items()
        ]
        share = case["share_of_copy"].get("cuda") or case["share_of_copy"].get("cpu") or 0
        rows.append([case["op"], case["case"], f"{share:.2f}", "  ".join(times)])
    print(table(rows))
    print(f"\n{summary(cases)}")


def left_out(results: list[dict[str, Any]]) -> list[str]:
    """Jobs that did not start or end in time, and the cases that a bench had no time for."""
    late = [job["name"] for job in results if "out of time" in job.get("error", "")]
    return [*late, *(case for job in results for case in job.get("left_out", []))]
