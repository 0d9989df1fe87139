"""``adsc bench``: the ops of a boundary on this machine, beside PyTorch's way and a plain copy."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from adsc_kernels.cli import bench_e2e, options
from adsc_kernels.cli.text import in_bytes, table
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.schedule import CompressionSchedule

if TYPE_CHECKING:
    import torch

ROUNDS = 15
PROMPT = 101 + 576  # tokens
MOST_BYTES = 2**30  # of the rows that a call reads; in all a run takes about ten times as much
BACKENDS = ("cuda", "triton", "cpu")


def add_parser(commands: Any) -> None:
    """Add ``bench`` and its options to the commands."""
    parser = commands.add_parser(
        "bench",
        help="how fast the ops are here, beside PyTorch's way and a plain copy",
        description="Time the ops of one boundary on this machine: medians of calls that take "
        "turns, in microseconds, and the bytes they must read and write per second. The full "
        "benchmarks are `make bench` and `make gpu-bench`, in the source folder.",
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=("ops", "e2e"),
        default="ops",
        help="the ops of a boundary, or whole prompts and answers of a decoder (ops)",
    )
    parser.add_argument(
        "--batch",
        type=options.integer(1, 2**20),
        nargs="+",
        default=[8],
        help="prompts of one picture (8); e2e takes several",
    )
    parser.add_argument(
        "--hidden", type=options.integer(1, 2**20), default=4096, help="hidden size (4096)"
    )
    parser.add_argument("--keep", default="1/4", help="share of 576 vision tokens (default 1/4)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    _add_e2e(parser)
    parser.set_defaults(execute=execute)


def _add_e2e(parser: argparse.ArgumentParser) -> None:
    """What only whole prompts and answers have."""
    e2e = parser.add_argument_group("e2e")
    positive = options.integer(1, 2**15)
    e2e.add_argument(
        "--shape", choices=tuple(bench_e2e.SHAPES), default="tiny", help="of the model (tiny)"
    )
    e2e.add_argument("--model", metavar="ID", help="a LLaVA-1.5 checkpoint in place of a shape")
    e2e.add_argument(
        "--vision",
        type=positive,
        nargs="+",
        default=[576],
        metavar="N",
        help="vision tokens of each prompt (576)",
    )
    e2e.add_argument(
        "--new-tokens",
        type=positive,
        nargs="+",
        default=[32],
        metavar="N",
        help="of each answer (32)",
    )
    e2e.add_argument(
        "--ways", nargs="+", choices=bench_e2e.WAYS, default=bench_e2e.WAYS, help="of all (all)"
    )
    e2e.add_argument(
        "--memory",
        type=options.integer(1, 2**20),
        metavar="GIB",
        help="also the largest batch that fits so much, and how fast it decodes",
    )
    e2e.add_argument(
        "--headline", action="store_true", help="the cases of the README, two minutes of an H200"
    )
    e2e.add_argument("--runs", type=positive, default=5, metavar="N", help="timed (5)")
    e2e.add_argument("--out", metavar="FILE", help="JSON, written anew with every case")


def execute(args: argparse.Namespace) -> None:
    """Measure and print."""
    if args.what == "e2e":
        bench_e2e.execute(args)
        return
    if len(args.batch) != 1:
        raise ValueError(f"--batch: expected one number for ops, got {len(args.batch)}")
    (batch,) = args.batch
    schedule = CompressionSchedule.parse(f"1:{args.keep}", num_layers=2)
    if (size := batch * PROMPT * args.hidden * 2) > MOST_BYTES:
        raise ValueError(
            f"--batch, --hidden: expected at most {in_bytes(MOST_BYTES)} of rows, got "
            f"{in_bytes(size)}"
        )
    device = options.device(args.device)
    try:
        found = measure(batch, args.hidden, schedule, device)
    except RuntimeError as error:  # as torch says that there is no memory, on any device
        raise ValueError(f"--batch, --hidden, --device: {error}") from None
    if args.json:
        print(json.dumps(found, indent=1))
        return
    rows = [
        [op, way, f"{us:.1f}", f"{facts['bytes_moved'] / us / 1e3:.1f}"]
        for op, facts in found["ops"].items()
        for way, us in facts["microseconds"].items()
    ]
    print(f"{found['device']}, torch {found['torch']}: {found['case']}\n")
    print(table(["op", "by", "µs", "GB/s"], rows, left=2))


def measure(
    batch: int, hidden: int, schedule: CompressionSchedule, device: torch.device
) -> dict[str, Any]:
    """Microseconds of each op by each way, and the bytes that it must move."""
    import torch

    from adsc_kernels import ops
    from adsc_kernels.plan import make_plan

    bounds = [b * PROMPT for b in range(batch + 1)]
    spans = [(b, 35, 576) for b in range(batch)]
    stage = make_plan(schedule, bounds, spans, device=device).stages[1]
    rows = stage.keep_indices()
    shape = (2, stage.num_tokens_in, hidden)
    x, residual = torch.randn(shape, device=device, dtype=torch.bfloat16).unbind()
    weight = torch.rand(hidden, device=device, dtype=torch.bfloat16)
    positions = torch.arange(len(x), device=device)

    def norm() -> object:
        h = x.index_select(0, rows) + residual.index_select(0, rows)
        return torch.nn.functional.rms_norm(h, weight.shape, weight, 1e-6)

    row = hidden * x.itemsize
    every: dict[str, tuple[int, Callable[[], object], Callable[[], object]]] = {
        "downsample": (
            2 * row,
            lambda: ops.downsample(x, stage),
            lambda: x.index_select(0, rows),
        ),
        "downsample_many": (
            2 * (2 * row + 8),
            lambda: ops.downsample_many([x, residual, positions], stage),
            lambda: [t.index_select(0, rows) for t in (x, residual, positions)],
        ),
        "downsample_add_rms_norm": (
            4 * row,
            lambda: ops.downsample_add_rms_norm(x, residual, weight, stage),
            norm,
        ),
    }
    serving = [name for name in BACKENDS if _serves(name, device)]
    found = {}
    for op, (row_bytes, ours, pytorch) in options.progress(every.items(), "ops", len(every)):
        size = row_bytes * stage.num_tokens
        source, target = torch.empty(2, size // 2, dtype=torch.uint8, device=device).fill_(1)
        ways = {name: _under(name, ours) for name in serving}
        ways["PyTorch"] = pytorch
        ways["plain copy"] = partial(target.copy_, source)
        found[op] = {"bytes_moved": size, "microseconds": _medians(ways, device)}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    case = f"batch {batch}, hidden {hidden} bfloat16, {stage.num_tokens} of {len(x)} rows stay"
    return {"device": name, "torch": torch.__version__, "case": case, "ops": found}


def _serves(name: str, device: torch.device) -> bool:
    from adsc_kernels.backend import backend, resolve

    try:
        with backend(name):
            return resolve(device) == name
    except UnsupportedError:
        return False


def _under(name: str, run: Callable[[], object]) -> Callable[[], object]:
    from adsc_kernels.backend import backend

    def call() -> object:
        with backend(name):
            return run()

    return call


def _medians(ways: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The ways take turns, so that whatever else the machine does hits all alike."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, run in ways.items():
            begin = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append((time.perf_counter() - begin) * 1e6)
    return {name: round(statistics.median(of[1:]), 2) for name, of in times.items()}
