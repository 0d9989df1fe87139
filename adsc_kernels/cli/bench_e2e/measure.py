"""A case's ways by turns, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from adsc_kernels.accounting import ModelShape, account
from adsc_kernels.cli import options
from adsc_kernels.cli.bench_e2e.cases import TEXT, Case
from adsc_kernels.cli.bench_e2e.device_time import device_time, share_outside
from adsc_kernels.cli.bench_e2e.models import Models
from adsc_kernels.cli.bench_e2e.ways import Way, make_way
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.schedule import CompressionSchedule

WARM = 2  # answers: graphs are captured in the second
PROFILED = 4  # steps of decode


class Answer(NamedTuple):
    """Milliseconds to the first tokens, and for each step after it."""

    first: float
    step: float


def ways_of(models: Models, case: Case) -> tuple[dict[str, Way], dict[str, str]]:
    """The case's ways, and why some of them are not to be had."""
    ways, refused = {}, {}
    for name in case.ways:
        try:
            ways[name] = make_way(name, models, case)
        except UnsupportedError as error:
            refused[name] = str(error)
    return ways, refused


@torch.no_grad()
def measure(models: Models, case: Case, runs: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each way, medians of `runs` answers, and why some are left out."""
    device = models.ours.device
    ways, refused = ways_of(models, case)
    peaks: dict[str, int | None] = {}
    for name, way in ways.items():
        peak = peak_since(device)
        answer(way, case, device)
        peaks[name] = None if peak is None else peak() + way.weight_bytes
    answers: dict[str, list[Answer]] = {name: [] for name in ways}
    for turn in options.progress(range(WARM - 1 + runs), "runs"):
        for name, way in ways.items():
            found = answer(way, case, device)
            if turn >= WARM - 1:
                answers[name].append(found)
    rows = []
    for name, way in ways.items():
        row = {"way": name, **_timed(way, case, answers[name]), "peak_bytes": peaks[name]}
        rows.append({**of_case(case, way, models.shape), **row, **_on_device(way, case, device)})
    return rows, refused


def of_case(case: Case, way: Way, shape: ModelShape) -> dict[str, Any]:
    """What a row is a measurement of."""
    return {
        "batch": case.batch,
        "vision_tokens": case.vision,
        "text_tokens": sum(TEXT),
        "new_tokens": case.new_tokens,
        "average_tokens": round(sum(way.tokens) / len(way.tokens), 2),
        "prefill_macs": case.batch * layer_macs(shape, way.tokens),
    }


def layer_macs(shape: ModelShape, tokens: Sequence[int]) -> int:
    """Multiply-accumulates of the decoder's layers on one prompt, by vision tokens of each."""
    dense = CompressionSchedule.dense(shape.num_layers)
    cost = {
        count: account(shape, dense, sum(TEXT), count).layers[0].prefill.total
        for count in set(tokens)
    }
    return sum(cost[count] for count in tokens)


def answer(way: Way, case: Case, device: torch.device) -> Answer:
    """One, timed."""
    steps = case.new_tokens - 1 if way.decodes else 0
    begin = now(device)
    tokens = way.prefill()
    first = now(device)
    if steps:
        way.decode(tokens, steps)
    end = now(device)
    return Answer((first - begin) * 1e3, (end - first) * 1e3 / max(steps, 1))


def now(device: torch.device) -> float:
    """Seconds, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _timed(way: Way, case: Case, answers: list[Answer]) -> dict[str, Any]:
    first = statistics.median(answer.first for answer in answers)
    found: dict[str, Any] = {
        "ttft_ms": round(first, 3),
        "ttft_least_ms": round(min(answer.first for answer in answers), 3),
        "ms_per_token": None,
        "tokens_per_second": None,
        "cache_bytes": way.cache_bytes,
    }
    if way.decodes:
        step = statistics.median(answer.step for answer in answers)
        seconds = (first + step * (case.new_tokens - 1)) / 1e3
        found["ms_per_token"] = round(step, 3) if case.new_tokens > 1 else None
        found["tokens_per_second"] = round(case.batch * case.new_tokens / seconds, 1)
    return found


def _on_device(way: Way, case: Case, device: torch.device) -> dict[str, Any]:
    """Where the time of a prompt and of a step goes."""
    prompt = device_time(way.prefill, device)
    found: dict[str, Any] = {"prefill": prompt, "share_outside": share_outside(prompt)}
    steps = min(PROFILED, case.new_tokens - 1) if way.decodes else 0
    tokens = torch.zeros(case.batch, dtype=torch.int64, device=device)
    found["step"] = device_time(lambda: way.decode(tokens, steps), device, steps) if steps else {}
    return found


def peak_since(device: torch.device) -> Callable[[], int] | None:
    """Of memory, from now on, beyond what is taken now; None where nobody counts."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    return lambda: torch.cuda.max_memory_allocated(device) - before
