"""Times ops on a GPU beside what one would write without them.

A contestant is a function of one set of buffers. It is called on many sets in turn, together
several times the L2 cache, so that each call finds its bytes in device memory and leaves its
outputs there. Three times of a call, each a median of repetitions:

  graph_us   all calls captured in one CUDA graph and replayed: what the device takes (events)
  eager_us   the same calls from Python one after the other: what a caller without graphs waits
  host_us    until the call returns, with nothing queued before it: what the host takes

Bytes are counted, not measured: every row that is needed read once and written once. GB/s comes
from graph_us. `share_of_copy` is the time of the fastest plain copy of as many bytes over that of
the contestant. Three copies are timed in the same run: memcpy in a graph, where a large one is
slower than on a stream; memcpy on a stream; and a copy kernel in a graph.

ADSC_GPU_DRY_RUN=1 runs the same on CPU tensors with the wall clock: a check of these files whose
numbers mean nothing.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adsc_kernels as adsc

DRY_RUN = os.environ.get("ADSC_GPU_DRY_RUN") == "1"
DEVICE = torch.device("cpu" if DRY_RUN else "cuda")
BACKENDS = ("cpu",) if DRY_RUN else ("cuda", "triton")
REPETITIONS = 2 if DRY_RUN else 20  # at most: no measurement takes much longer than LONG
LONG = 0.1  # seconds
CALLS = 2 if DRY_RUN else 16  # at least, in a graph: the start of a graph is spread over them
MANY_BYTES = 256 << 20  # a call that moves as much is long beside the start of a graph
MOST_SETS = 2 if DRY_RUN else 64
LARGE_COPY = 1 << (16 if DRY_RUN else 30)

Call = Callable[[], object]
Run = Callable[[Any], Any]


@dataclass(frozen=True)
class Case:
    """One op at one size.

    make: a new set of buffers with random contents. ours: on a set, under each backend. baselines:
    other ways, by name; PyTorch's, called eager, also through torch.compile unless `compiled` is
    False. telling: of the first part. tolerance: how far outputs may lie from the first baseline's;
    None where there is none, or where the call changes its buffers.
    """

    op: str
    name: str
    bytes_moved: int  # read and written
    make: Callable[[], Any]
    ours: Run
    baselines: dict[str, Run] = field(default_factory=dict)
    compiled: bool = False
    telling: bool = False
    tolerance: float | None = 0.0


def synchronize() -> None:
    if not DRY_RUN:
        torch.cuda.synchronize()


def microseconds(run: Call) -> float:
    """The median time of a call, queued behind a call so that the host is ahead of the device."""
    begin = time.perf_counter()
    run()
    synchronize()
    repetitions = max(min(int(LONG / (time.perf_counter() - begin)), REPETITIONS), 2)
    if DRY_RUN:
        begin = time.perf_counter()
        for _ in range(repetitions):
            run()
        return (time.perf_counter() - begin) / repetitions * 1e6
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    run()
    for mark in marks[:-1]:
        mark.record()
        run()
    marks[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) * 1e3


def host_microseconds(calls: Sequence[Call]) -> float:
    """The median time until a call returns that finds the device idle."""
    found = []
    for call in itertools.islice(itertools.cycle(calls), REPETITIONS):
        synchronize()
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return statistics.median(found) * 1e6


def captured(calls: Sequence[Call]) -> Call:
    """All calls as one CUDA graph. Their outputs stay alive with it, or the next call would write
    to the same memory, which the cache still holds."""
    if DRY_RUN:
        return lambda: [call() for call in calls]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]

    def replay() -> object:
        graph.replay()
        return outputs

    return replay


def in_turn(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def times(calls: Sequence[Call]) -> dict[str, float]:
    """graph_us, eager_us and host_us of one call among these."""
    for call in calls[:3]:  # compile, load, reserve
        call()
    synchronize()
    host = host_microseconds(calls)
    eager = microseconds(in_turn(calls)) / len(calls)
    graph = microseconds(captured(calls)) / len(calls)
    return {"graph_us": round(graph, 3), "eager_us": round(eager, 3), "host_us": round(host, 3)}


def number_of_sets(bytes_moved: int) -> int:
    """So many that what they move is four times the L2 cache, within reason."""
    cache = 1 << 16 if DRY_RUN else torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return min(MOST_SETS, max(2, -(-4 * cache // max(bytes_moved, 1))))


def repeated(runs: Iterable[Call], bytes_moved: int) -> list[Call]:
    """The same calls over and over until there are enough for a graph."""
    runs = list(runs)
    return runs * -(-(CALLS if bytes_moved < MANY_BYTES else CALLS // 4 or 1) // len(runs))


@functools.cache
def copy_times(bytes_moved: int) -> dict[str, dict[str, float]]:
    """Of plain copies that read half of the bytes and write the other half."""
    words = max(bytes_moved // 16, 1)
    pairs = [
        [torch.randint(0, 255, (words,), device=DEVICE) for _ in range(2)]
        for _ in range(number_of_sets(bytes_moved))
    ]
    ways: dict[str, Callable[[Tensor, Tensor], object]] = {"copy": Tensor.copy_}
    with contextlib.suppress(ImportError):  # without Triton
        from plain_kernels import copy

        ways["copy kernel"] = copy
    found = {}
    for name, way in ways.items():
        pairs[0][0].zero_()
        way(*pairs[0])
        assert torch.equal(*pairs[0]), name
        found[name] = times(repeated((partial(way, a, b) for a, b in pairs), bytes_moved))
    return found


def fastest(copies: dict[str, dict[str, float]]) -> float:
    """The time of the fastest plain copy, in a graph or on a stream."""
    return min(copy[kind] for copy in copies.values() for kind in ("graph_us", "eager_us"))


def ceilings() -> dict[str, float]:
    """What no call can be faster than: a large copy, and a kernel that does nothing."""
    copy = fastest(copy_times(2 * LARGE_COPY))
    empty = times([partial(torch.cuda._sleep, 0)] * 256) if not DRY_RUN else times([int] * 2)
    return {
        "copy_gb_per_s": round(2 * LARGE_COPY / copy / 1e3, 1),
        "empty_kernel_graph_us": empty["graph_us"],
        "empty_kernel_eager_us": empty["eager_us"],
    }


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [t for part in output or () for t in tensors(part)]


def check(case: Case, run: Run, wanted: list[Tensor], buffers: Any) -> None:
    got = tensors(run(buffers))
    for mine, truth in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, truth, rtol=case.tolerance, atol=case.tolerance)


def contestants_of(case: Case, compiled: bool) -> dict[str, Run]:
    found = {**dict.fromkeys(BACKENDS, case.ours), **case.baselines}
    if compiled:
        compiler = "aot_eager" if DRY_RUN else "inductor"
        for name, run in case.baselines.items():
            if name.startswith("eager"):
                found[f"{name} compiled"] = torch.compile(run, fullgraph=True, backend=compiler)
    return found


def measure(case: Case, compiled: bool) -> dict[str, Any]:
    """Every contestant's times, in microseconds, and what they mean. A contestant that fails is
    reported as such, and the others go on."""
    torch.compiler.reset()
    sets = [case.make() for _ in range(number_of_sets(case.bytes_moved))]
    wanted = []
    if case.tolerance is not None:
        wanted = tensors(next(iter(case.baselines.values()))(sets[0]))
    found: dict[str, dict[str, Any]] = {}
    for name, run in contestants_of(case, compiled).items():
        try:
            with adsc.backend(name if name in BACKENDS else "auto"):
                if case.tolerance is not None:
                    check(case, run, wanted, sets[0])
                found[name] = times(
                    repeated((partial(run, buffers) for buffers in sets), case.bytes_moved)
                )
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
            print(f"{case.op} {case.name} {name}: {found[name]['error']}", flush=True)
    del sets, wanted
    copies = copy_times(case.bytes_moved)
    found.update(copies)
    good = {name: t["graph_us"] for name, t in found.items() if "graph_us" in t}
    return {
        "op": case.op,
        "case": case.name,
        "bytes_moved": case.bytes_moved,
        "times": found,
        "gb_per_s": {n: round(case.bytes_moved / us / 1e3, 1) for n, us in good.items()},
        "share_of_copy": {n: round(fastest(copies) / us, 3) for n, us in good.items()},
    }


def measure_all(cases: Iterable[Case], file: Path, until: float, compiled: bool) -> int:
    """Measures all, in this order, and writes JSON to the file after each; 1 where one failed or
    was left out. None begins when time.monotonic() is past `until`."""
    torch.manual_seed(0)
    report: dict[str, Any] = {"ceilings": ceilings(), "cases": [], "left_out": []}
    file.write_text(json.dumps(report))
    for case in cases:
        if time.monotonic() > until:
            report["left_out"].append(f"{case.op} {case.name}")
        else:
            report["cases"].append(measure(case, compiled and case.compiled))
            print(json.dumps(report["cases"][-1]), flush=True)
            if not DRY_RUN:
                torch.cuda.empty_cache()
        file.write_text(json.dumps(report))
    failed = [c for c in report["cases"] for name in BACKENDS if "error" in c["times"][name]]
    return int(bool(failed or report["left_out"]))
