"""``adsc eval``: accuracy of methods at budgets, with intervals, resumable."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adsc_kernels.cli import options, text

if TYPE_CHECKING:
    from adsc_kernels.evaluation.results import Results
    from adsc_kernels.llava import Llava


def add_parser(commands: Any) -> None:
    """Add ``eval`` and its options to the commands."""
    parser = commands.add_parser(
        "eval",
        help="measure accuracy by method, budget and seed",
        description="Ask every question of a folder in LLaVA's format by every method, and count "
        "the answers that greedy decoding gives word for word. Results go to a JSON file, from "
        "which the same command goes on where it stopped.",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER|FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="the results")
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a LLaVA-1.5 (the bundled one)")
    parser.add_argument(
        "--adapter", type=Path, metavar="FOLDER", help="one that `adsc train` made; --method adsc"
    )
    parser.add_argument(
        "--method", nargs="+", default=["adsc"], metavar="NAME", help="as adsc_kernels.baselines"
    )
    parser.add_argument(
        "--schedule", nargs="+", default=[], metavar="TEXT", help="of adsc and random; '' is dense"
    )
    parser.add_argument(
        "--budget",
        type=options.integer(1),
        nargs="+",
        default=[],
        metavar="N",
        help="of the other methods: vision tokens that a layer processes on average",
    )
    parser.add_argument("--seed", type=options.count, nargs="+", default=[0], help="of random (0)")
    parser.add_argument("--batch", type=options.integer(1, 4096), default=16, help="(16)")
    parser.add_argument("--device", metavar="DEVICE", help="(cuda where there is one, else cpu)")
    parser.add_argument(
        "--dtype", choices=options.DTYPES, help="of weights (float16 on a GPU, else float32)"
    )
    parser.add_argument("--limit", type=options.integer(1), metavar="N", help="of the questions")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> None:
    """Print a table of all that was asked for; ``ValueError`` or ``OSError`` for bad input."""
    device = options.device(args.device)
    dtype = options.dtype(args.dtype, device)
    from adsc_kernels.baselines import make_method
    from adsc_kernels.evaluation.results import Results, digest
    from adsc_kernels.evaluation.run import evaluate, questions_of, summary
    from adsc_kernels.llava import Llava
    from adsc_kernels.training.records import Records

    records = Records(args.data)
    questions = questions_of(records)[: args.limit]
    folder = options.model_folder(args.model)
    about = {"data": digest(records.file), "questions": len(questions), "model": folder.name}
    results = Results(args.out, about)
    model = Llava.from_pretrained(folder, None, device, dtype, adapter=args.adapter)
    keys = list(_asked(args, model))
    methods = [make_method(key["method"], model.config, **_settings(key, model)) for key in keys]
    entries = [results.entry(**key) for key in keys]
    left = sum(len(questions) - len(entry["right"]) for entry in entries)
    with options.bar("questions", left) as bar:
        for method, entry in zip(methods, entries, strict=True):
            entry["average"] = float(method.average)
            evaluate(model, method, records, questions, entry, results, args.batch, bar.update)
    dense = _dense(results)
    rows = [{**_shown(entry), **summary(entry, questions, dense)} for entry in entries]
    print(json.dumps(rows, indent=1) if args.json else _as_text(rows))


def _asked(args: argparse.Namespace, model: Llava) -> Any:
    """Every combination, as the keys of entries."""
    from adsc_kernels.baselines import BY_SCHEDULE

    adapter = None if args.adapter is None else args.adapter.resolve().parent.name
    for name in args.method:
        by_schedule = name in BY_SCHEDULE
        if adapter is not None and name != "adsc":
            raise ValueError(f"--adapter: expected with --method adsc, got {name}")
        given = args.schedule if by_schedule else args.budget
        if by_schedule and not given and adapter is not None:
            given = [str(model.schedule)]
        if not given:
            option = "--schedule" if by_schedule else "--budget"
            raise ValueError(f"{option}: expected with --method {name}, got none")
        for one in given:
            for seed in args.seed if name == "random" else [0]:
                where = {"schedule": one} if by_schedule else {"budget": one}
                yield {
                    "method": name,
                    "schedule": None,
                    "budget": None,
                    "seed": seed,
                    "adapter": adapter,
                    **where,
                }


def _settings(key: dict[str, Any], model: Llava) -> dict[str, Any]:
    if key["schedule"] is None:
        return {"budget": key["budget"], "seed": key["seed"]}
    schedule = options.schedule(key["schedule"], model.config.num_layers)
    return {"schedule": schedule, "seed": key["seed"]}


def _dense(results: Results) -> str | None:
    """What the model as it came answers with all tokens, where that was measured."""
    for run in results.data["runs"]:
        if run["method"] == "adsc" and run["schedule"] == "" and run["adapter"] is None:
            return run["right"]
    return None


def _shown(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "right"}


def _as_text(rows: list[dict[str, Any]]) -> str:
    header = ["method", "schedule or budget", "adapter", "seed", "average", "accuracy", "95 %"]
    lines = []
    for row in rows:
        where = row["schedule"] if row["budget"] is None else str(row["budget"])
        low, high = row["by_picture"]
        retained = f"{row['retention']:.1%}" if "retention" in row else "-"
        lines.append(
            [row["method"], where or "dense", row["adapter"] or "-", str(row["seed"])]
            + [f"{row['average']:.1f}", f"{row['accuracy']:.1%}"]
            + [f"{low:.1%} to {high:.1%}", retained]
        )
    return text.table([*header, "of dense"], lines, left=3)
