"""All that docs/accuracy.md rests on: data, training runs and evaluations, into one JSON file.

python accuracy.py --work runs/accuracy                 # goes on where it stopped
python accuracy.py --work runs/accuracy --device cuda --jobs 12
python accuracy.py --work runs/accuracy --part eval     # what can be evaluated so far
python accuracy.py --work runs/accuracy --part export --out ../../docs/accuracy.json
python ../../tools/accuracy_page.py                     # the page, of docs/accuracy.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from adsc_kernels.evaluation.run import questions_of, summary
from adsc_kernels.training.records import Records
from dataset import write
from runs import RUNS, SCHEDULES, Run

PICTURES = 150  # held out: 2,318 questions
BUDGETS = ("64", "36", "16", "128", "192")  # the telling ones first
SEEDS = ("0", "1", "2")
OTHERS = (
    *("uniform", "average_pooling", "div_prune", "fastv", "pyramid_drop", "sparse_vlm"),
    *("vision_zip", "downsampling"),
)
ABOVE_36 = ("fastv", "pyramid_drop", "sparse_vlm")  # their first layer alone takes 36 of 576
FIRST_RUNS = 12  # before the methods that train nothing
ADSC = [sys.executable, "-m", "adsc_kernels.cli"]


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


class Work:
    """A folder of runs, results and logs, and the commands that fill it."""

    def __init__(self, folder: Path, part: str | None, device: str) -> None:
        self.folder, self.part, self.device = folder, part, device
        self.train, self.held_out = data(folder)
        for name in ("runs", "results", "logs"):
            (folder / name).mkdir(exist_ok=True)

    def jobs(self) -> Iterator[tuple[str, list[list[str]]]]:
        """The most telling first: a name, and commands that wait for one another."""
        for run in RUNS[:FIRST_RUNS]:
            yield run.name, self.of_run(run)
        if self.part != "train":
            yield from ((f"methods-{n}", [one]) for n, one in enumerate(self.methods()))
        for run in RUNS[FIRST_RUNS:]:
            yield run.name, self.of_run(run)

    def of_run(self, run: Run) -> list[list[str]]:
        """Trains an adapter and evaluates it."""
        out = self.folder / "runs" / run.name
        commands = []
        if self.part != "eval":
            file = out.with_suffix(".yaml")
            config = run.config(self.train, out.parent, self.device)
            file.write_text(yaml.safe_dump(config, sort_keys=False))
            commands.append([*ADSC, "train", "--config", str(file)])
        if self.part != "train" and (self.part is None or (out / "adapter").is_dir()):
            adapted = ["--adapter", str(out / "adapter"), "--method", "adsc"]
            commands.append(self.evaluation(run.name, adapted))
            if run.at_others:
                others = [SCHEDULES[budget] for budget in BUDGETS if budget != run.budget]
                commands.append(self.evaluation(run.name, [*adapted, "--schedule", *others]))
        return commands

    def methods(self) -> Iterator[list[str]]:
        """Evaluations of the model as it came."""
        schedules = [SCHEDULES[budget] for budget in BUDGETS]
        yield self.evaluation("adsc", ["--method", "adsc", "--schedule", *schedules, ""])
        for name in OTHERS:
            budgets = [one for one in BUDGETS if int(one) > 36 or name not in ABOVE_36]
            yield self.evaluation(name, ["--method", name, "--budget", *budgets])
        drawn = ["--method", "random", "--schedule", *schedules, "--seed", *SEEDS]
        yield self.evaluation("random", drawn)

    def evaluation(self, name: str, asked: list[str]) -> list[str]:
        """Results of each name have a file of their own, so that many can be at work."""
        given = ["--data", str(self.held_out)]
        given += ["--out", str(self.folder / "results" / f"{name}.json")]
        given += ["--device", self.device, "--dtype", "float32"]
        given += ["--batch", "16" if self.device == "cpu" else "128"]
        return [*ADSC, "eval", *given, *asked]

    def do(self, name: str, commands: list[list[str]]) -> int:
        """Run a job with what it says in a log; its exit status."""
        with (self.folder / "logs" / f"{name}.log").open("a") as log:
            for command in commands:
                status = subprocess.run(command, stdout=log, stderr=log).returncode
                if status:
                    return status
        return 0

    def do_all(self, at_once: int) -> None:
        """Every job, so many side by side; those that failed are said at the end."""
        cores = max((os.cpu_count() or 1) // at_once, 1)
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
        jobs = list(self.jobs())
        pool = ThreadPoolExecutor(at_once)
        try:
            found = list(pool.map(lambda job: self.do(*job), jobs))
        finally:
            pool.shutdown(cancel_futures=True)
        failed = [name for (name, _), status in zip(jobs, found, strict=True) if status]
        if failed:
            sys.exit(f"failed, as {self.folder / 'logs'} says: {', '.join(failed)}")


def export(work: Work) -> dict[str, Any]:
    """What was measured on all questions, and how the adapters came about."""
    results = [json.loads(f.read_text()) for f in sorted((work.folder / "results").glob("*.json"))]
    about = results[0]["about"]
    if any(one["about"] != about for one in results):
        sys.exit(f"{work.folder / 'results'}: expected results about {about}, got others too")
    questions = questions_of(Records(work.held_out))
    runs = [run for one in results for run in one["runs"]]
    whole = [run for run in runs if len(run["right"]) == len(questions)]
    dense = [run["right"] for run in whole if run["schedule"] == "" and run["adapter"] is None]
    rows = []
    for run in whole:
        found = summary(run, questions, *dense)
        rows.append({**{name: run[name] for name in run if name != "right"}, **rounded(found)})
    training = {}
    for run in RUNS:
        facts = work.folder / "runs" / run.name / "adapter" / "adsc.json"
        if facts.is_file():
            training[run.name] = json.loads(facts.read_text())["training"]
    return {"about": {**about, "schedules": SCHEDULES}, "runs": rows, "training": training}


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
    parser.add_argument("--part", choices=["train", "eval", "export"])
    parser.add_argument("--device", default="cpu", help="of training and evaluation (cpu)")
    parser.add_argument("--jobs", type=int, default=1, help="side by side (1)")
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    work = Work(args.work, args.part, args.device)
    if args.part != "export":
        work.do_all(args.jobs)
    if args.part in (None, "export") and args.out is not None:
        args.out.write_text(json.dumps(export(work), indent=1) + "\n")


if __name__ == "__main__":
    main()
