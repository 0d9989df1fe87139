"""All that docs/accuracy.md rests on: data, training runs and evaluations, into one JSON file.

python accuracy.py --work runs/accuracy                 # goes on where it stopped
python accuracy.py --work runs/accuracy --part eval     # what can be evaluated so far
python accuracy.py --work runs/accuracy --part export --out ../../docs/accuracy.json
python ../../tools/accuracy_page.py                     # the page, of docs/accuracy.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adsc_kernels.evaluation.run import questions_of, summary
from adsc_kernels.training.records import Records
from dataset import write
from runs import RUNS, SCHEDULES, train_all

PICTURES = 150  # held out: 2,318 questions
BUDGETS = ("64", "36", "16", "128", "192")  # the telling ones first
SEEDS = ("0", "1", "2")
OTHERS = (
    *("uniform", "average_pooling", "div_prune", "fastv", "pyramid_drop", "sparse_vlm"),
    *("vision_zip", "downsampling"),
)
ABOVE_36 = ("fastv", "pyramid_drop", "sparse_vlm")  # their first layer alone takes 36 of 576


def data(work: Path) -> tuple[Path, Path]:
    """The folders of training and held-out questions, written if they are not there."""
    made = []
    for split, pictures, seed in (("train", 4000, 0), ("held-out", PICTURES, 7)):
        folder = work / "data" / split
        if not (folder / "conversations.json").is_file():
            training = split == "train"
            write(split, pictures, seed, folder, augment=training, shuffle=training)
        made.append(folder)
    return made[0], made[1]


def evaluations(work: Path) -> Iterator[list[str]]:
    """Arguments of `adsc eval`, the most telling first; adapters as far as they are there."""
    schedules = [SCHEDULES[budget] for budget in BUDGETS]
    yield ["--method", "adsc", "--schedule", *schedules[:3]]
    for run in RUNS:
        adapter = work / "runs" / run.name / "adapter"
        if not adapter.is_dir():
            continue
        yield ["--adapter", str(adapter), "--method", "adsc"]
        if run.budget == "dense":  # more training alone, then dropped from
            yield ["--adapter", str(adapter), "--method", "adsc", "--schedule", *schedules]
    yield ["--method", "adsc", "--schedule", ""]
    for budget in BUDGETS:
        for name in OTHERS:
            if int(budget) > 36 or name not in ABOVE_36:
                yield ["--method", name, "--budget", budget]
        if int(budget) > 64:
            yield ["--method", "adsc", "--schedule", SCHEDULES[budget]]
    for schedule in schedules:
        yield ["--method", "random", "--schedule", schedule, "--seed", *SEEDS]


def export(work: Path, held_out: Path) -> dict[str, Any]:
    """What was measured on all questions, and how the adapters came about."""
    results = json.loads((work / "accuracy.json").read_text())
    questions = questions_of(Records(held_out))
    whole = [run for run in results["runs"] if len(run["right"]) == len(questions)]
    dense = [run["right"] for run in whole if run["schedule"] == "" and run["adapter"] is None]
    rows = []
    for run in whole:
        found = summary(run, questions, *dense)
        rows.append({**{name: run[name] for name in run if name != "right"}, **rounded(found)})
    facts = {
        run.name: json.loads((work / "runs" / run.name / "adapter" / "adsc.json").read_text())
        for run in RUNS
        if (work / "runs" / run.name / "adapter").is_dir()
    }
    training = {name: fact["training"] for name, fact in facts.items()}
    about = {**results["about"], "schedules": SCHEDULES}
    return {"about": about, "runs": rows, "training": training}


def rounded(value: Any) -> Any:
    """To a hundredth of a per cent."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    """Do what is left of all parts, or of one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", choices=["data", "train", "eval", "export"])
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    args = parser.parse_args()
    train, held_out = data(args.work)
    if args.part in (None, "train"):
        train_all(train, args.work / "runs")
    if args.part in (None, "eval"):
        results = args.work / "accuracy.json"
        for arguments in evaluations(args.work):
            command = [sys.executable, "-m", "adsc_kernels.cli", "eval", "--device", "cpu"]
            command += ["--data", str(held_out), "--out", str(results), *arguments]
            if done := subprocess.run(command).returncode:
                sys.exit(f"adsc eval ended with status {done}")
    if args.part in (None, "export") and args.out is not None:
        args.out.write_text(json.dumps(export(args.work, held_out), indent=1) + "\n")


if __name__ == "__main__":
    main()
