"""A case's ways by turns, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from adsc_kernels.accounting import ModelShape, account
from adsc_kernels.cli import options
from adsc_kernels.cli.bench_e2e.cases import TEXT, Case
from adsc_kernels.cli.bench_e2e.device_time import device_time, share_outside
from adsc_kernels.cli.bench_e2e.models import Models
from adsc_kernels.cli.bench_e2e.ways import Decoding, Way, make_way
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.schedule import CompressionSchedule

WARM_STEPS = 3  # a step is run, then captured, then replayed
DECODED = 3  # answers, the last ones: a step is timed by many as it is
PROFILED = 2  # steps of decode


class Answer(NamedTuple):
    """Milliseconds to the first tokens, and for each step after it where there are any."""

    first: float
    step: float | None


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
        steps, peak = steps_of(way, case), peak_since(device)
        for _ in range(2):  # a prompt is run, then captured
            answer(way, min(steps, WARM_STEPS), device)
        peaks[name] = None if peak is None else peak() + way.weight_bytes
    answers: dict[str, list[Answer]] = {name: [] for name in ways}
    for turn in options.progress(range(runs), "runs"):
        for name, way in ways.items():
            steps = steps_of(way, case) if turn >= runs - DECODED else 0
            answers[name].append(answer(way, steps, device))
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


def steps_of(way: Way, case: Case) -> int:
    """Of decode: the first token is the prompt's."""
    return case.new_tokens - 1 if isinstance(way, Decoding) else 0


def answer(way: Way, steps: int, device: torch.device) -> Answer:
    """One, timed."""
    begin = now(device)
    tokens = way.prefill()
    first = now(device)
    if steps == 0 or not isinstance(way, Decoding):
        return Answer((first - begin) * 1e3, None)
    way.decode(tokens, steps)
    return Answer((first - begin) * 1e3, (now(device) - first) * 1e3 / steps)


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
    if isinstance(way, Decoding):
        times = [answer.step for answer in answers if answer.step is not None]
        step = statistics.median(times) if times else 0.0
        seconds = (first + step * (case.new_tokens - 1)) / 1e3
        found["ms_per_token"] = round(step, 3) if times else None
        found["tokens_per_second"] = round(case.batch * case.new_tokens / seconds, 1)
    return found


def _on_device(way: Way, case: Case, device: torch.device) -> dict[str, Any]:
    """Where the time of a prompt and of a step goes."""
    prompt = device_time(way.prefill, device)
    found: dict[str, Any] = {"prefill": prompt, "share_outside": share_outside(prompt)}
    found["step"] = {}
    steps = min(PROFILED, steps_of(way, case))
    if steps > 0 and isinstance(way, Decoding):
        decode = partial(way.decode, torch.zeros(case.batch, dtype=torch.int64, device=device))
        found["step"] = device_time(partial(decode, steps), device, steps)
    return found


def peak_since(device: torch.device) -> Callable[[], int] | None:
    """Of memory, from now on, beyond what is taken now; None where nobody counts."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    return lambda: torch.cuda.max_memory_allocated(device) - before
