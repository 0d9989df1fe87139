"""Makes the README's performance tables of the result files in bench/results.

    python bench/table.py            writes them into README.md
    python bench/table.py --check    exits with 1 where README.md says anything else

Each stands between a pair of markers, `<!-- gpu-results -->` and `<!-- /gpu-results -->`, and
`cpu-results` likewise. Of several results of one target the latest counts. Where there is none for
a GPU, the table is a line that says so and how to get one. The result of a dry run is refused.
"""
# ruff: noqa: E501 (sentences of the README)

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
UNRUN = (
    "**GPU**: unrun. No GPU was at hand for this version, so there are no figures here. `make gpu-test`, "
    "`make gpu-sanitize` and\n`make gpu-bench` take what they find on a machine with one, and "
    "`python bench/table.py` makes this table of what they write."
)


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The latest report of each target; that of pytest-benchmark is `cpu-bench`."""
    latest: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        report = json.loads(file.read_text())
        if "benchmarks" in report:
            target, date = "cpu-bench", report["datetime"]
        else:
            target, date = report["target"], report["stamp"]["date"]
            if report["stamp"]["dry_run"]:
                raise ValueError(f"{file.name}: expected a result of a GPU, got one of a dry run")
        if target not in latest or date >= latest[target]["_date"]:
            latest[target] = {**report, "_date": date}
    return latest


def table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# ---- GPU ----


def stamp_of(report: dict[str, Any]) -> str:
    stamp = report["stamp"]
    changed = " with changes" if stamp["changed_files"] else ""
    return (
        f"{stamp['device']}, driver {stamp['driver']}, torch {stamp['torch']}, triton "
        f"{stamp['triton']}, nvcc {stamp['nvcc']}, {stamp['date']}, commit "
        f"{(stamp['commit'] or 'unknown')[:10]}{changed}"
    )


GPU_HEADING = [
    "op", "case", "MiB moved", "µs", "GB/s", "of copy", "Triton", "eager", "compiled", "µs from Python", "eager from Python",
]  # fmt: skip


def gpu_row(case: dict[str, Any]) -> list[str]:
    """Times of the native kernel, and how many times as long the others take."""
    times = case["times"]
    if "graph_us" not in times.get("cuda", {}):
        return [f"`{case['op']}`", case["case"], "failed", *["–"] * (len(GPU_HEADING) - 3)]
    ours = times["cuda"]

    def ratio(name: str, kind: str) -> str:
        return f"{times[name][kind] / ours[kind]:.2f}" if kind in times.get(name, {}) else "–"

    others = [name for name in times if name not in ("cuda", "triton", "copy")]
    eager = min(
        (name for name in others if not name.endswith("compiled") and "graph_us" in times[name]),
        key=lambda name: times[name]["graph_us"],
        default="",
    )
    return [
        f"`{case['op']}`",
        case["case"],
        f"{case['bytes_moved'] / 2**20:.2f}",
        f"{ours['graph_us']:.1f}",
        f"{case['gb_per_s']['cuda']:.0f}",
        f"{case['share_of_copy']['cuda']:.2f}",
        ratio("triton", "graph_us"),
        ratio(eager, "graph_us"),
        ratio(f"{eager} compiled", "graph_us"),
        f"{ours['eager_us']:.1f}",
        ratio(eager, "eager_us"),
    ]


def gpu_section(results: dict[str, dict[str, Any]]) -> str:
    if "gpu-bench" not in results:
        return UNRUN
    bench = results["gpu-bench"]
    jobs = [job for job in bench["jobs"] if "ceilings" in job]
    limits = [job["ceilings"] for job in jobs]
    copy = max(limit["copy_gb_per_s"] for limit in limits)
    empty = min(limit["empty_kernel_graph_us"] for limit in limits)
    parts = [
        f"**GPU** ({stamp_of(bench)}). Medians with a cold L2 cache, from `make gpu-bench`. µs, GB/s (bytes "
        f"read and written) and *of copy* (the time of a plain copy of as many bytes over this one's) are the CUDA "
        f"kernel's in a CUDA graph; Triton, eager PyTorch with its indices on the device and `torch.compile` of it are "
        f"times as long, in a graph too; *from Python* without a graph. A large copy moves {copy:.0f} GB/s, an empty "
        f"kernel takes {empty:.2f} µs.",
        table(GPU_HEADING, [gpu_row(case) for job in jobs for case in job["cases"]]),
    ]
    left_out = [name for job in jobs for name in job["left_out"]]
    failed = [job["name"] for job in bench["jobs"] if not job["ok"]]
    if left_out or failed:
        parts.append(
            f"Left out for time: {', '.join(left_out) or 'none'}. Failed: {', '.join(failed) or 'none'}."
        )
    if "gpu-test" in results:
        jobs = results["gpu-test"]["jobs"]
        passed, bad = (sum(job.get(kind, 0) for job in jobs) for kind in ("passed", "failed"))
        skipped = sum(sum(job.get("skipped", {}).values()) for job in jobs)
        unfinished = sum("error" in job for job in jobs)
        parts.append(
            f"`make gpu-test` ({stamp_of(results['gpu-test'])}): {passed} passed, {bad} failed, {skipped} skipped, "
            f"{unfinished} of {len(jobs)} files not finished."
        )
    if "gpu-sanitize" in results:
        said = [
            f"{job['name']}: {job.get('summary') or job.get('error')}"
            for job in results["gpu-sanitize"]["jobs"]
        ]
        parts.append(
            f"`make gpu-sanitize` ({stamp_of(results['gpu-sanitize'])}): " + "; ".join(said) + "."
        )
    return "\n\n".join(parts)


# ---- CPU ----


def cpu_section(results: dict[str, dict[str, Any]]) -> str:
    if "cpu-bench" not in results:
        return "**CPU**: unrun; `make bench` measures it."
    report = results["cpu-bench"]
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


# ---- The README ----

SECTIONS = {"gpu-results": gpu_section, "cpu-results": cpu_section}


def filled(readme: str, results: dict[str, dict[str, Any]]) -> str:
    """The README with its tables as the results have them."""
    for name, section in SECTIONS.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        if readme.count(begin) != 1 or readme.count(end) != 1:
            raise ValueError(
                f"README.md: expected one pair of markers {begin.strip()} and {end.strip()}"
            )
        before, rest = readme.split(begin)
        readme = before + begin + section(results) + end + rest.split(end)[1]
    return readme


def main() -> int:
    parser = argparse.ArgumentParser(description="The README's performance tables.")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where it differs")
    options = parser.parse_args()
    file = ROOT / "README.md"
    readme = file.read_text(encoding="utf-8")
    wanted = filled(readme, read_results(RESULTS))
    if options.check and readme != wanted:
        print("README.md: its tables are not those of bench/results; run python bench/table.py")
        return 1
    if readme != wanted:
        file.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
