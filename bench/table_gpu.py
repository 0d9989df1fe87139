"""The README's and docs/performance.md's words and tables about a GPU, of its result files."""
# ruff: noqa: E501 (sentences of those pages)

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

Report = dict[str, Any]
Results = dict[str, list[Report]]

UNRUN = (
    "**GPU**: unrun. No GPU was at hand for this version, so there are no figures here. `make gpu-all` takes what "
    "it finds\non a machine with one, and `python bench/table.py` makes this table of what it writes."
)
# The README's rows; docs/performance.md has them all.
HEADLINE = [
    ("downsample", "batch 1, hidden 4096"),
    ("downsample", "batch 32, hidden 4096"),
    ("downsample", "batch 128, hidden 4096"),
    ("downsample_add_rms_norm", "batch 1, hidden 4096"),
    ("downsample_add_rms_norm", "batch 32, hidden 4096"),
    ("boundary_step", "batch 1, hidden 4096"),
    ("boundary_step", "batch 32, hidden 4096"),
    ("rebuild_metadata", "32 sequences"),
    ("rebuild_metadata", "8192 sequences"),
    ("compact_kv_", "7B, batch 8, 576 to 144, dense NHD, bfloat16"),
    ("compact_paged_kv_", "7B, batch 8, 576 to 144, blocks of 16, bfloat16"),
    ("compress_step", "batch 8, hidden 4096, 8 layers"),
]
HEADING = [
    "op", "case", "MiB moved", "µs", "GB/s", "of copy", "Triton", "PyTorch", "compiled", "µs from Python", "PyTorch from Python", "host µs", "PyTorch, host",
]  # fmt: skip
NO_COPY = ("rebuild_metadata",)  # what it moves is not what it does


def table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def commit_of(report: Report) -> str:
    changed = " with changes" if report["stamp"]["changed_files"] else ""
    return f"commit {(report['stamp']['commit'] or 'unknown')[:10]}{changed}"


def stamp_of(report: Report) -> str:
    stamp = report["stamp"]
    return (
        f"{stamp['device']}, driver {stamp['driver']}, torch {stamp['torch']}, triton "
        f"{stamp['triton']}, nvcc {stamp['nvcc']}, {stamp['date']}, {commit_of(report)}"
    )


# ---- Cases ----


def copy_us(case: Report) -> float:
    """The fastest copy of as many bytes, however it was issued."""
    copies = [t for name, t in case["times"].items() if name.startswith("copy")]
    return min(t[kind] for t in copies for kind in ("graph_us", "eager_us") if kind in t)


def pytorch(case: Report, kind: str) -> str:
    """The fastest of the baselines that are PyTorch without a compiler; empty where none ran."""
    names = [
        name
        for name, times in case["times"].items()
        if name.startswith("eager") and not name.endswith("compiled") and kind in times
    ]
    return min(names, key=lambda name: case["times"][name][kind], default="")


def ratio(case: Report, name: str, kind: str) -> float | None:
    """How many times as long another contestant takes as the CUDA kernel."""
    times = case["times"]
    if kind not in times.get(name, {}) or kind not in times.get("cuda", {}):
        return None
    return times[name][kind] / times["cuda"][kind]


def row(case: Report) -> list[str]:
    times = case["times"]
    start = [f"`{case['op']}`", case["case"]]
    if "graph_us" not in times.get("cuda", {}):
        return [*start, "failed", *["–"] * (len(HEADING) - 3)]
    ours = times["cuda"]
    compiled = next((name for name in times if name.endswith("compiled")), "")
    ratios = [
        ratio(case, "triton", "graph_us"),
        ratio(case, pytorch(case, "graph_us"), "graph_us"),
        ratio(case, compiled, "graph_us"),
        ratio(case, pytorch(case, "eager_us"), "eager_us"),
        ratio(case, pytorch(case, "host_us"), "host_us"),
    ]
    triton, eager, fused, python, host = ("–" if r is None else f"{r:.2f}" for r in ratios)
    share = "–" if case["op"] in NO_COPY else f"{copy_us(case) / ours['graph_us']:.2f}"
    return [
        *start, f"{case['bytes_moved'] / 2**20:.2f}", f"{ours['graph_us']:.1f}",
        f"{case['bytes_moved'] / ours['graph_us'] / 1e3:.0f}", share, triton, eager, fused,
        f"{ours['eager_us']:.1f}", python,
        f"{ours['host_us']:.1f}" if "host_us" in ours else "–", host,
    ]  # fmt: skip


def cases_of(jobs: list[Report]) -> list[Report]:
    """Each once, op by op: one measured again, with more beside it, counts as it was then."""
    cases = [case for job in jobs for case in job.get("cases", [])]
    ops = list(dict.fromkeys(case["op"] for case in cases))
    latest = {(case["op"], case["case"]): case for case in cases}
    return sorted(latest.values(), key=lambda case: ops.index(case["op"]))


def losses(cases: list[Report]) -> str:
    """In how many cases of each op something else is faster; a sentence."""
    rivals = {
        "PyTorch in a graph": lambda c: ratio(c, pytorch(c, "graph_us"), "graph_us"),
        "PyTorch compiled": lambda c: ratio(
            c, next((n for n in c["times"] if n.endswith("compiled")), ""), "graph_us"
        ),
        "Triton in a graph": lambda c: ratio(c, "triton", "graph_us"),
        "PyTorch from Python": lambda c: ratio(c, pytorch(c, "eager_us"), "eager_us"),
        "PyTorch on the host": lambda c: ratio(c, pytorch(c, "host_us"), "host_us"),
    }
    parts = []
    for rival, of in rivals.items():
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for case in cases:
            found = of(case)
            if found is not None:
                counts[case["op"]][0] += found < 1
                counts[case["op"]][1] += 1
        lost = [f"`{op}` {n} of {all_}" for op, (n, all_) in counts.items() if n]
        if lost:
            parts.append(f"{rival}: {', '.join(lost)}")
    return f"**Where something else is faster**, of so many cases. {'. '.join(parts) or 'Nowhere'}."


EXPLAINED = (
    "µs and *of copy* (the time of the fastest plain copy of as many bytes over this "
    "one's) are the CUDA kernel's in a CUDA graph with a cold L2 cache, medians. The columns behind them say how many "
    "times as long others take: Triton, eager PyTorch with its indices on the device, `torch.compile` of that; below 1 "
    "they are faster. *From Python* is without a graph, *host* the time until a call returns"
)


def headline(results: Results) -> str:
    """The README's part: at most twelve rows, and where it loses."""
    if "gpu-bench" not in results:
        return UNRUN
    bench = results["gpu-bench"][-1]
    cases = cases_of(bench["jobs"])
    found = {(case["op"], case["case"]): case for case in cases}
    rows = [row(found[key]) for key in HEADLINE if key in found]
    keep = [i for i, name in enumerate(HEADING) if name not in ("GB/s", "PyTorch, host")]
    parts = [
        f"**GPU** ({stamp_of(bench)}): measured at that commit; kernels that changed since are unrun. {EXPLAINED}:",
        table([HEADING[i] for i in keep], [[cells[i] for i in keep] for cells in rows]),
        losses(cases),
        "All cases, what was left out, the GPU tests: [docs/performance.md](docs/performance.md).",
    ]
    return "\n\n".join(parts)


def all_cases(results: Results) -> str:
    if "gpu-bench" not in results:
        return UNRUN
    bench = results["gpu-bench"][-1]
    cases = cases_of(bench["jobs"])
    limits = [job["ceilings"] for job in bench["jobs"] if "ceilings" in job]
    copy = max(limit["copy_gb_per_s"] for limit in limits)
    empty = min(limit["empty_kernel_graph_us"] for limit in limits)
    parts = [
        f"{stamp_of(bench)}. {EXPLAINED}. GB/s counts bytes read and written. A copy of 1 GiB in a graph moves {copy:.0f} GB/s, an empty kernel takes {empty:.2f} µs.",
        table(HEADING, [row(case) for case in cases]),
        losses(cases),
    ]
    left_out = [name for job in bench["jobs"] for name in job.get("left_out", [])]
    failed = [job["name"] for job in bench["jobs"] if "error" in job] + [
        f"{case['op']} {case['case']} ({name})"
        for case in cases
        for name, times in case["times"].items()
        if "error" in times
    ]
    parts.append(
        f"Left out for time: {'; '.join(left_out) or 'none'}. Failed: {', '.join(failed) or 'none'}."
    )
    return "\n\n".join(parts)


# ---- Tests ----


def tests(results: Results) -> str:
    """What ran, failed and did not end, for each report of the latest commit."""
    parts = []
    for report in results.get("gpu-test", []):
        jobs = report["jobs"]
        backends = "/".join(dict.fromkeys(job["name"].rpartition(", ")[2] for job in jobs))
        counts = [sum(job.get(kind, 0) for job in jobs) for kind in ("passed", "failed")]
        skipped = sum(sum(job.get("skipped", {}).values()) for job in jobs)
        late = [job["name"].rpartition(", ")[0] for job in jobs if "error" in job]
        lines = [
            f"**`make gpu-test`, {backends}** ({stamp_of(report)}): {counts[0]} passed, {counts[1]} failed, "
            f"{skipped} skipped; not ended in time: {', '.join(late) or 'none'}."
        ]
        failures = [failure["test"] for job in jobs for failure in job.get("failures", [])]
        lines += [f"- failed: `{test.removeprefix('python_tests.gpu.')}`" for test in failures]
        parts.append("\n".join(lines))
    for report in results.get("gpu-sanitize", []):
        said = [
            f"{job['name']}: {job.get('summary') or job.get('error')}" for job in report["jobs"]
        ]
        parts.append(f"**`make gpu-sanitize`** ({stamp_of(report)}): " + "; ".join(said) + ".")
    return "\n\n".join(parts) or "GPU tests: unrun."
