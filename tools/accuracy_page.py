"""Writes the tables and the plot of docs/accuracy.md, of docs/accuracy.json, and the cost table of
docs/llava-1.5-7b.md, of the accounting.

`python tools/accuracy_page.py`; python_tests/test_accuracy_page.py fails where the page that is
committed says anything else.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adsc_kernels import CompressionSchedule
from adsc_kernels.accounting import ModelShape, account
from adsc_kernels.training.config import CurriculumSettings
from adsc_kernels.training.curriculum import Curriculum

DOCS = Path(__file__).parents[1] / "docs"
BUDGETS = ("192", "128", "64", "36", "16")
FULL, LAYERS = 576, 16
KINDS = ("cell", "count", "largest", "side", "where", "row", "all")
NAMES = {  # of a row of the table, what it is called, in order
    "strong_to_mild": "ADSC, trained strong to mild",
    "64-then-others": "ADSC, that adapter for 64, at every budget",
    "mild_to_strong": "ADSC, trained mild to strong",
    "constant": "ADSC, trained at the budget",
    "dense-then-others": "ADSC, trained dense for as many steps",
    "uniform-trained": "uniform, trained at the budget",
    "adsc": "ADSC, untrained",
    "random": "random, at ADSC's layers",
    "uniform": "uniform, in front of the decoder",
    "average_pooling": "average pooling",
    "div_prune": "DivPrune",
    "pyramid_drop": "PyramidDrop",
    "fastv": "FastV",
    "sparse_vlm": "SparseVLM",
    "vision_zip": "VisionZip",
    "downsampling": "a smaller picture",
}
FLOORED = ("pyramid_drop", "fastv", "sparse_vlm")  # whose first layer alone takes 36
# LLaVA-1.5-7B: text tokens of an example, examples, FLOP/s that are sustained, examples at once.
TEXT_7B, EXAMPLES, RATE, BATCH_7B = 300, 665_298, 3e14, 8
Run = dict[str, Any]


def read() -> dict[str, Any]:
    return json.loads((DOCS / "accuracy.json").read_text(encoding="utf-8"))


def place(run: Run, schedules: dict[str, str]) -> tuple[str, str] | None:
    """The row and the budget of a measurement; None for the dense ones."""
    of = {text: budget for budget, text in schedules.items()}
    if run["adapter"] is not None:
        budget, direction, _ = run["adapter"].split("-")
        if direction == "uniform":
            return "uniform-trained", budget
        asked = of[run["schedule"]]
        if budget == asked:
            return None if budget == "dense" else (direction, budget)
        return f"{budget}-then-others", asked
    if run["budget"] is not None:
        return run["method"], str(run["budget"])
    return None if run["schedule"] == "" else (run["method"], of[run["schedule"]])


def grouped(data: dict[str, Any]) -> dict[tuple[str, str], list[Run]]:
    found: dict[tuple[str, str], list[Run]] = {}
    for run in data["runs"]:
        where = place(run, data["about"]["schedules"])
        if where is not None:
            found.setdefault(where, []).append(run)
    return found


def shown(data: dict[str, Any]) -> dict[tuple[str, str], list[Run]]:
    """`grouped`, with the adapter for 64 at its own budget in both of its rows."""
    runs = grouped(data)
    if own := runs.get(("strong_to_mild", "64")):
        runs["64-then-others", "64"] = own
    return runs


def dense_runs(data: dict[str, Any]) -> list[Run]:
    return [run for run in data["runs"] if place(run, data["about"]["schedules"]) is None]


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(runs: Sequence[Run], row: str, budget: str) -> str:
    """Accuracy: of one run with its interval by picture, of several seeds their mean and range."""
    if not runs:
        return "out of reach" if row in FLOORED and int(budget) <= 36 else "not run"
    shares = [100 * run["accuracy"] for run in runs]
    if len(runs) == 1:
        low, high = runs[0]["by_picture"]
        spread = f"{100 * low:.1f} to {100 * high:.1f}"
    else:
        spread = f"{len(runs)} seeds, {min(shares):.1f} to {max(shares):.1f}"
    mean = statistics.fmean(shares)
    return f"**{mean:.1f}** ({spread})"


def accuracy(data: dict[str, Any]) -> str:
    runs = shown(data)
    present = [row for row in NAMES if any((row, budget) in runs for budget in BUDGETS)]
    rows = [
        [NAMES[row], *(cell(runs.get((row, budget), []), row, budget) for budget in BUDGETS)]
        for row in present
    ]
    return table(("method", *BUDGETS), rows)


def retention(data: dict[str, Any]) -> str:
    runs = shown(data)
    rows = []
    for row in NAMES:
        kept = [
            [r["retention"] for r in runs.get((row, b), []) if "retention" in r] for b in BUDGETS
        ]
        if any(kept):
            means = [f"{100 * statistics.fmean(one):.1f}" if one else "" for one in kept]
            rows.append([NAMES[row], *means])
    return table(("method", *BUDGETS), rows) if rows else "Dense has not been measured yet."


def by_task(data: dict[str, Any]) -> str:
    runs = grouped(data)
    rows = []
    first: dict[str, Any] = {}  # of the seeds
    for run in dense_runs(data):
        first.setdefault("dense" if run["adapter"] is None else "dense, trained on", run["by_kind"])
    named = [*first.items()]
    for budget in BUDGETS:
        for row in ("adsc", "constant", "strong_to_mild"):
            named += [
                (f"{NAMES[row]}, {budget}", run["by_kind"])
                for run in runs.get((row, budget), [])[:1]
            ]
    for name, kinds in named:
        rows.append([name, *(f"{100 * kinds[kind]:.0f}" for kind in KINDS)])
    return table(("", *KINDS), rows)


def training(data: dict[str, Any]) -> str:
    rows = []
    for name, how in data["training"].items():
        own = CompressionSchedule.parse(how["schedule"], LAYERS)
        *before, _ = Curriculum(CurriculumSettings(**how["curriculum"]), own, how["steps"]).phases
        through = " → ".join(f"`{phase}`" for phase in before) or "none"
        rows.append(
            [name, f"`{how['schedule']}`", through, str(how["steps"]), str(how["batch_size"])]
            + [", ".join(f"{took / 60:.1f} ({on})" for on, took in how["seconds"].items())]
        )
    header = ("adapter", "schedule", "through", "steps", "questions a step", "minutes (on)")
    return table(header, rows)


def about(data: dict[str, Any]) -> str:
    dense = [run for run in dense_runs(data) if run["adapter"] is None]
    said = "Dense has not been measured yet."
    if dense:
        low, high = (100 * share for share in dense[0]["by_picture"])
        share = 100 * dense[0]["accuracy"]
        said = f"Dense, {FULL} tokens: **{share:.1f}** ({low:.1f} to {high:.1f})."
    devices = sorted({on for run in data["runs"] for on in run["seconds"]})
    named = (on.replace("cuda ", "GPU in ").replace("cpu ", "CPU in ") for on in devices)
    asked = " and ".join(f"a {on}" for on in named)
    return f"{data['about']['questions']} held-out questions, asked on {asked}. {said}"


def cost_7b(data: dict[str, Any]) -> str:
    """What training LLaVA-1.5-7B takes, by the accounting: nothing here is measured."""
    shape = ModelShape.preset("llava-1.5-7b")
    rows = []
    for name in ("dense", *(f"llava-1.5-7b/{budget}" for budget in (192, 128, 64))):
        dense = CompressionSchedule.dense(shape.num_layers)
        schedule = dense if name == "dense" else CompressionSchedule.preset(name)
        found = account(shape, schedule, TEXT_7B)
        prefill = found.prefill
        # Forward, once more for checkpointing, and backward of activations; the tower forward only.
        macs = 3 * found.decoder_macs + prefill.tower + prefill.projector
        hours = 2 * macs * EXAMPLES / RATE / 3600
        rows_kept = sum(
            len(stage.layers) * (tokens + TEXT_7B)
            for stage, tokens in zip(found.stages, found.vision_tokens, strict=True)
        )
        kept = rows_kept * shape.hidden_size * 2 * BATCH_7B / 2**30
        logits = (found.vision_tokens[-1] + TEXT_7B) * shape.vocab_size * 4 * BATCH_7B / 2**30
        rows.append(
            [name.split("/")[-1], f"`{schedule}`" if str(schedule) else "", f"{macs / 1e12:.1f} T"]
            + [f"{hours:.1f} h", f"{hours / 8:.1f} h", f"{kept:.1f} GiB", f"{logits:.1f} GiB"]
        )
    header = ("budget", "schedule", "MACs an example", "1 GPU", "8 GPUs")
    return table((*header, "inputs of layers kept", "logits, float32"), rows)


PAGES = {
    "accuracy.md": {
        "about": about,
        "accuracy": accuracy,
        "retention": retention,
        "tasks": by_task,
        "training": training,
    },
    "llava-1.5-7b.md": {"cost": cost_7b},
}


def page(name: str, data: dict[str, Any]) -> str:
    """A page with its tables made anew."""
    text = (DOCS / name).read_text(encoding="utf-8")
    for section, make in PAGES[name].items():
        pattern = rf"(<!-- {section} -->\n).*?(<!-- /{section} -->)"
        made = make(data)
        text, count = re.subn(
            pattern, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"{name}: expected one section {section}, got {count}")
    return text


def plot(data: dict[str, Any]) -> Any:
    """Accuracy against the budget, a line for each method."""
    from matplotlib.figure import Figure

    runs = shown(data)
    figure = Figure(figsize=(11, 5.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for n, (row, name) in enumerate(NAMES.items()):
        points = [(int(b), runs[row, b]) for b in BUDGETS if (row, b) in runs]
        if not points:
            continue
        shares = [100 * statistics.fmean(r["accuracy"] for r in some) for _, some in points]
        trained = n < list(NAMES).index("adsc")
        axes.plot(
            [x for x, _ in points],
            shares,
            label=name,
            color=f"C{n % 10}",
            marker="os^vDPX"[n % 7],
            linestyle="-" if trained else (0, (4, 2)),
            linewidth=2.4 if trained else 1.4,
        )
    for run in dense_runs(data):
        if run["adapter"] is None:
            axes.axhline(100 * run["accuracy"], color="black", linewidth=1, label="dense")
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(b) for b in BUDGETS], BUDGETS)
    axes.set_xlabel("vision tokens that a layer processes on average, of 576")
    axes.set_ylabel("exact answers, %")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right center")
    return figure


def main() -> None:
    data = read()
    for name in PAGES:
        (DOCS / name).write_text(page(name, data), encoding="utf-8")
    plot(data).savefig(DOCS / "accuracy.png")


if __name__ == "__main__":
    main()
