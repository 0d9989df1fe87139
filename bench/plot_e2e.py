"""Draws docs/e2e.png: how much faster a prompt is against the MACs saved, and where its time goes.

python bench/plot_e2e.py      (needs matplotlib; of the latest end-to-end result in bench/results)
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from reach_e2e import PICTURE, Row, by_case, prompts_of
from table import RESULTS, ROOT, read_results
from table_e2e import KINDS, NAMES, reports_of

# Told apart by most colour-blind people, and in grey (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#999999")
MARKERS = {
    "192": "o", "128": "s", "64": "^", "before": "x", "smaller": "+", "fastv": "v",
    "pyramid_drop": "D",
}  # fmt: skip
BARS = ("dense", "192", "128", "64")


def figure(report: dict[str, Any]) -> Figure:
    rows = [row for row in prompts_of(report["rows"]) if row["vision_tokens"] == PICTURE]
    page = Figure(figsize=(11, 4.4), dpi=100, layout="constrained")
    left, right = page.subplots(1, 2)
    draw_gains(left, rows)
    draw_times(right, rows)
    stamp = report["stamp"]
    commit = (stamp["commit"] or "unknown")[:10]
    page.suptitle(f"{report['model']} on {stamp['device']}, commit {commit}", size=10)
    return page


def draw_gains(panel: Axes, rows: list[Row]) -> None:
    """Of each way its first token against dense's; on the line, MACs are all that costs time."""
    batches = sorted({row["batch"] for row in rows})
    most = 0.0
    for colour, batch in zip(COLOURS, batches, strict=False):
        ways = by_case(rows)[PICTURE, batch]
        if (dense := ways.get("dense")) is None:
            continue
        for way, marker in MARKERS.items():
            if (row := ways.get(way)) is None:
                continue
            saved = 1 - row["prefill_macs"] / dense["prefill_macs"]
            most = max(most, saved)
            panel.plot(100 * saved, dense["ttft_ms"] / row["ttft_ms"], marker, color=colour, ms=6)
        panel.plot([], [], "-", color=colour, label=f"batch {batch}")
    line = [most * n / 50 for n in range(51)]
    panel.plot([100 * x for x in line], [1 / (1 - x) for x in line], "--", color="#000000", lw=1)
    for way in dict.fromkeys(row["way"] for row in rows if row["way"] in MARKERS):
        panel.plot([], [], MARKERS[way], color="#555555", label=NAMES.get(way, way))
    panel.set(xlabel="MACs of the decoder saved, %", ylabel="first token, times as fast as dense")
    panel.legend(fontsize=7)
    panel.grid(alpha=0.3)


def draw_times(panel: Axes, rows: list[Row]) -> None:
    """Device time by kind, for each batch as a share of dense's."""
    at, names = 0.0, []
    for (_, batch), ways in by_case(rows).items():
        whole = ways["dense"]["prefill"].get("ms") if "dense" in ways else None
        if not whole:
            continue
        for way in BARS:
            if way not in ways:
                continue
            bottom, kinds = 0.0, ways[way]["prefill"]["by_kind"]
            for colour, kind in zip(COLOURS, KINDS, strict=True):
                ms = kinds.get(kind, 0.0) + (kinds.get("copy", 0.0) if kind == "other" else 0.0)
                panel.bar(at, 100 * ms / whole, bottom=bottom, color=colour, width=0.8)
                bottom += 100 * ms / whole
            names.append((at, way if way != "dense" else f"dense\nbatch {batch}"))
            at += 1
        at += 0.5
    for colour, name in zip(COLOURS, KINDS.values(), strict=True):
        panel.bar(0, 0, color=colour, label=name)
    panel.set_xticks([x for x, _ in names], [name for _, name in names], fontsize=7)
    panel.set_ylabel("device time of the prompt, % of dense")
    panel.legend(fontsize=7)


if __name__ == "__main__":
    found = reports_of(read_results(RESULTS))
    if not found:
        print("no end-to-end result in bench/results: docs/e2e.png stays as it is")
    else:
        figure(found[0]).savefig(ROOT / "docs" / "e2e.png")
