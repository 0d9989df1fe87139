"""``adsc bench e2e``: prompts and answers of a whole decoder on this machine, dense and compressed.

Weights and picture features are random and made on the device, in the shape of a known model, or
the weights are a checkpoint's. `cases.py` says what can be measured, `ways.py` how it is answered,
`measure.py`, `largest.py` and `device_time.py` what is taken of it.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adsc_kernels.cli import options
from adsc_kernels.cli.bench_e2e.cases import FEWER, GIB, HEADLINE, SHAPES, WAYS, Case
from adsc_kernels.cli.bench_e2e.report import text_of, write
from adsc_kernels.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from adsc_kernels.cli.bench_e2e.models import Models

__all__ = ["SHAPES", "WAYS", "execute"]


def execute(args: argparse.Namespace) -> None:
    """Measure, write with every case, and print."""
    import torch

    from adsc_kernels.stamp import stamp

    device = options.device(args.device)
    cases = cases_of(args)
    file = None if args.out is None else Path(args.out)
    if file is not None and not file.parent.is_dir():
        raise ValueError(f"--out: expected a file in a folder that exists, got {args.out!r}")
    try:
        models = models_of(args, device)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"--shape: {device} ran out of memory ({error})") from None
    found: dict[str, Any] = {
        "target": "gpu-e2e",
        "stamp": stamp(device),
        "model": args.shape if args.model is None else args.model,
        "dtype": str(models.ours.new_cache(0).dtype),
        "runs": args.runs,
        "rows": [],
        "left_out": [],
    }
    if not args.json:
        facts = found["stamp"]
        print(f"{facts['device']}, torch {facts['torch']}: {found['model']}, {found['dtype']}")
    for case in cases:
        rows = run_case(models, case, args.runs, found["left_out"])
        found["rows"] += rows
        if file is not None:
            write(found, file)
        if rows and not args.json:
            print(f"\n{text_of(rows)}", flush=True)
    if not found["rows"]:
        raise ValueError(f"nothing was measured: {found['left_out'][0]['reason']}")
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for left in found["left_out"]:
            print(f"\nleft out: {left['way']}, batch {left['batch']}: {left['reason']}")


def cases_of(args: argparse.Namespace) -> list[Case]:
    """What the options ask for."""
    if args.headline:
        return list(HEADLINE)
    ways, memory = tuple(args.ways), args.memory
    cases = [
        Case(vision, new, ways, batch)
        for vision in args.vision
        for new in args.new_tokens
        for batch in args.batch
    ]
    if memory is not None:
        if min(args.new_tokens) < 2:
            raise ValueError("--new-tokens: expected at least 2 with --memory, got 1")
        own = tuple(way for way in ways if way in FEWER)
        cases += [
            Case(vision, new, own, memory=memory * GIB)
            for vision in args.vision
            for new in args.new_tokens
        ]
    return cases


def models_of(args: argparse.Namespace, device: torch.device) -> Models:
    """Random ones, or a checkpoint's."""
    import torch

    from adsc_kernels.cli.bench_e2e.models import Models

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if args.model is not None:
        return Models.from_pretrained(args.model, device, dtype)
    return Models.random(SHAPES[args.shape], device, dtype)


def run_case(
    models: Models, case: Case, runs: int, left_out: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Its rows; what can't be had goes to left_out, with the reason."""
    import torch

    from adsc_kernels.cli.bench_e2e.largest import measure_largest
    from adsc_kernels.cli.bench_e2e.measure import measure

    rows: list[dict[str, Any]] = []

    def leave_out(way: str, reason: object) -> None:
        text = " ".join(str(reason).split())
        facts = {"vision_tokens": case.vision, "batch": case.batch, "way": way}
        left_out.append({**facts, "memory_bytes": case.memory, "reason": text})

    try:
        if case.memory is None:
            rows, refused = measure(models, case, runs)
            for name, reason in refused.items():
                leave_out(name, reason)
        else:
            for name in case.ways:
                try:
                    rows.append(measure_largest(models, case, name, runs))
                except UnsupportedError as error:
                    leave_out(name, error)
    except torch.OutOfMemoryError as error:
        leave_out("the rest", f"out of memory: {error}")
    # What a case held, graphs too, is not in the way of the next.
    gc.collect()
    if models.ours.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows
