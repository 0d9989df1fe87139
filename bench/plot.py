"""Draws docs/gpu.png: GB/s against payload for each op, the plain copy and index_select beside it.

python bench/plot.py      (needs matplotlib; of the latest GPU bench in bench/results)
"""

from __future__ import annotations

import re

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from table import RESULTS, ROOT, read_results
from table_gpu import Report, cases_of, copy_us, pytorch

# Told apart by most colour-blind people, and in grey (Okabe and Ito).
LINES = {
    "the fastest copy": ("#000000", "--", ""),
    "CUDA": ("#0072B2", "-", "o"),
    "Triton": ("#009E73", "-", "s"),
    "PyTorch (index_select and the like)": ("#E69F00", "-", "^"),
    "torch.compile of it": ("#CC79A7", ":", "v"),
}
PANELS = {  # of each op the cases that differ in size alone
    "downsample": ("hidden 4096",),
    "downsample_many": ("hidden 4096",),
    "downsample_add_rms_norm": ("hidden 4096",),
    "boundary_step": ("hidden 4096",),
    "compact_kv_": ("7B", "576 to 144", "dense NHD", "bfloat16"),
    "compact_paged_kv_": ("7B", "576 to 144", "blocks of 16", "bfloat16"),
    "compress_step": ("hidden 4096",),
}


def is_one_of(case: Report, op: str) -> bool:
    words = case["case"].split(", ")
    extra = {"layout", "keep_indices"} & set(words)
    plain = any(re.fullmatch(r"batch \d+", word) for word in words)  # not ragged, and the like
    return case["op"] == op and plain and not extra and all(word in words for word in PANELS[op])


def times_of(case: Report) -> dict[str, float]:
    """µs in a graph by line of the plot."""
    times = case["times"]
    names = {"CUDA": "cuda", "Triton": "triton"}
    names["PyTorch (index_select and the like)"] = pytorch(case, "graph_us")
    names["torch.compile of it"] = next((n for n in times if n.endswith("compiled")), "")
    found = {
        line: times[name]["graph_us"]
        for line, name in names.items()
        if "graph_us" in times.get(name, {})
    }
    return {"the fastest copy": copy_us(case), **found}


def figure(bench: Report) -> Figure:
    cases = cases_of(bench["jobs"])
    drawn = [op for op in PANELS if any(is_one_of(case, op) for case in cases)]
    page = Figure(figsize=(11, 5.6), dpi=100, layout="constrained")
    panels = page.subplots(2, 4, sharey=True).flatten()
    for panel, op in zip(panels, drawn, strict=False):
        mine = sorted((c for c in cases if is_one_of(c, op)), key=lambda case: case["bytes_moved"])
        for line, (colour, style, marker) in LINES.items():
            points = [
                (c["bytes_moved"] / 2**20, c["bytes_moved"] / times_of(c)[line] / 1e3)
                for c in mine
                if line in times_of(c)
            ]
            if points:
                panel.plot(
                    *zip(*points, strict=True), style, color=colour, marker=marker, ms=4, label=line
                )
        panel.set(title=op, xscale="log", ylim=(0, None))
        panel.title.set_size(9)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    for panel in panels[len(drawn) :]:
        panel.set_axis_off()
    page.legend(*panels[0].get_legend_handles_labels(), loc="lower right", fontsize=8)
    stamp = bench["stamp"]
    page.supxlabel("MiB moved (read and written)", size=9)
    page.supylabel("GB/s in a CUDA graph", size=9)
    page.suptitle(f"{stamp['device']}, commit {stamp['commit'][:10]}, {stamp['date']}", size=10)
    return page


if __name__ == "__main__":
    figure(read_results(RESULTS)["gpu-bench"][-1]).savefig(ROOT / "docs" / "gpu.png")
