"""Makes the performance tables of README.md and docs/performance.md of what bench/results holds.

    python bench/table.py            writes them
    python bench/table.py --check    exits with 1 where a page says anything else

Each stands between a pair of markers, `<!-- gpu-results -->` and `<!-- /gpu-results -->`. Of several
results of one target those of the latest one's commit count. Where there is none for a GPU, the
README's table is a line that says so and how to get one. The result of a dry run is refused.
"""
# ruff: noqa: E501 (sentences of the README)

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reach
import table_e2e
import table_gpu
from table_gpu import Report, Results, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def read_results(folder: Path) -> Results:
    """Of each target the reports of one commit, that of the latest, by date; that of
    pytest-benchmark is `cpu-bench`. From this folder, and from those in it GPU reports."""
    found: dict[str, list[Report]] = {}
    for file in [*sorted(folder.glob("*.json")), *sorted(folder.glob("*/gpu-*.json"))]:
        report = json.loads(file.read_text())
        if "benchmarks" in report:
            entry = {**report, "_date": report["datetime"], "_of": ""}
            found.setdefault("cpu-bench", []).append(entry)
            continue
        stamp = report["stamp"]
        if stamp["dry_run"]:
            raise ValueError(f"{file.name}: expected a result of a GPU, got one of a dry run")
        entry = {**report, "_date": stamp["date"], "_of": stamp["commit"]}
        found.setdefault(report["target"], []).append(entry)
    for reports in found.values():
        reports.sort(key=lambda report: report["_date"])
    return {
        target: [r for r in reports if r["_of"] == reports[-1]["_of"]]
        for target, reports in found.items()
    }


def reach_section(results: Results) -> str:
    if "gpu-bench" not in results:
        return table_gpu.UNRUN
    return reach.summary(table_gpu.cases_of(results["gpu-bench"][-1]["jobs"]))


# ---- CPU ----


def cpu_section(results: Results) -> str:
    if "cpu-bench" not in results:
        return "**CPU**: unrun; `make bench` measures it."
    report = results["cpu-bench"][-1]
    machine = report["machine_info"]
    commit = report["commit_info"]["id"][:10]
    found = {bench["name"]: bench for bench in report["benchmarks"]}
    rows = []
    for name, bench in found.items():
        if name.startswith("test_64_mib"):
            info = bench["extra_info"]
            shares = ", ".join(
                f"{share:.2f} ({what.removeprefix('memcpy (').removesuffix(')')})"
                for what, share in info["share_of_memcpy"].items()
            )
            rate = info["gb_per_second"]["downsample"]
            case = name.partition("[")[2].removesuffix("]").replace("-", ", ")
            rows.append([case, rate, shares, f"{info['share_of_index_select']:.2f}"])
    parts = [
        f"**CPU `downsample`**, 64 MiB payload, rows of 4096 bf16, the best of each by turns in one run (`make bench`), "
        f"{machine['cpu']['count']} cores of {machine['cpu_name']}, torch {machine['torch']}, commit {commit}. GB/s "
        f"counts bytes read and written; *fresh* outputs are new memory, *reused* ones come from the allocator:",
        table(["case", "GB/s", "of memcpy", "of `index_select`"], rows),
    ]
    compact = compact_rows(found)
    if compact:
        parts += [
            "**CPU `compact_kv_` and `compact_paged_kv_`**, in the same run: K and V of LLaVA-1.5-7B's 32 layers in bf16, "
            "a picture's 576 tokens to 144 or 64, 1 or 4 sequences. memcpy copies as many bytes as move; PyTorch is the faster "
            "of `index_select` and back, and `index_copy_`. In each cell 1 → 144, 1 → 64, 4 → 144, 4 → 64:",
            table(
                [
                    "cache",
                    "1 thread, of memcpy",
                    "of PyTorch",
                    "2 threads, of memcpy",
                    "of PyTorch",
                ],
                compact,
            ),
        ]
    if {"test_plan", "test_numpy"} <= found.keys():
        ours, numpy = (found[name]["stats"]["min"] * 1e3 for name in ("test_plan", "test_numpy"))
        parts.append(
            f"**Planner**, 256 sequences × 8 images × 3 boundaries: {ours:.2f} ms (best), the same tables in "
            f"vectorised NumPy {numpy:.2f} ms."
        )
    return "\n\n".join(parts)


def compact_rows(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each form of cache; in a cell the cases of batch and kept tokens, in file order."""
    cells: dict[str, dict[str, list[str]]] = {}
    for name, bench in found.items():
        if not name.startswith("test_compact["):
            continue
        threads, form, _, _ = name.partition("[")[2].removesuffix("]").split("-")
        for what in ("share_of_memcpy", "times_pytorch"):
            column = cells.setdefault(form, {}).setdefault(f"{threads} {what}", [])
            column.append(f"{bench['extra_info'][what]:.2f}")
    return [[form, *map(" / ".join, columns.values())] for form, columns in cells.items()]


# ---- The pages ----

Sections = dict[str, Callable[[Results], str]]
PAGES: dict[str, Sections] = {
    "README.md": {
        "gpu-results": table_gpu.headline,
        "e2e-results": table_e2e.headline,
        "cpu-results": cpu_section,
    },
    "docs/performance.md": {
        "gpu-cases": table_gpu.all_cases,
        "gpu-reach": reach_section,
        "gpu-tests": table_gpu.tests,
        "e2e": table_e2e.all_rows,
    },
}


def filled(page: str, sections: Sections, results: Results) -> str:
    """The page with its tables as the results have them."""
    for name, section in sections.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"expected one pair of markers {begin.strip()} and {end}")
        before, rest = page.split(begin)
        page = before + begin + section(results) + "\n" + end + rest.split(end)[1]
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description="The tables of the pages about performance.")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where one differs")
    options = parser.parse_args()
    results = read_results(RESULTS)
    differ = False
    for name, sections in PAGES.items():
        file = ROOT / name
        page = file.read_text(encoding="utf-8")
        wanted = filled(page, sections, results)
        if page == wanted:
            continue
        differ = True
        if options.check:
            print(f"{name}: its tables are not those of bench/results; run python bench/table.py")
        else:
            file.write_text(wanted, encoding="utf-8")
    return int(differ and options.check)


if __name__ == "__main__":
    sys.exit(main())
