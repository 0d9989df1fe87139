"""The largest batch whose cache fits a memory, and how fast it decodes."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import torch

from adsc_kernels.accounting import account
from adsc_kernels.cli.bench_e2e.cases import GIB, TEXT, Case
from adsc_kernels.cli.bench_e2e.device_time import device_time
from adsc_kernels.cli.bench_e2e.measure import PROFILED, now, of_case, peak_since
from adsc_kernels.cli.bench_e2e.models import Models
from adsc_kernels.cli.bench_e2e.ways import Ours, make_way
from adsc_kernels.errors import UnsupportedError

# Beside weights and cache: prompts that are run a few at a time, and a step's rows and logits.
WORKSPACE = 2 * GIB


def largest_batch(models: Models, case: Case, name: str) -> int:
    """How many sequences fit the case's memory, by the accounting."""
    way = make_way(name, models, case)
    assert case.memory is not None and isinstance(way, Ours)
    each = account(
        models.shape,
        way.model.schedule,
        sum(TEXT),
        way.case.vision,
        case.new_tokens - 1,  # the last token of an answer is not run
        kv_dtype=str(way.cache.dtype).removeprefix("torch."),
    )
    return (case.memory - way.weight_bytes - WORKSPACE) // each.kv_bytes


@torch.no_grad()
def measure_largest(models: Models, case: Case, name: str, runs: int) -> dict[str, Any]:
    """Its cache is allocated and counts as filled by prompts; `runs` times the steps are timed.

    The prompts themselves are not run. Raises UnsupportedError where not even one fits.
    """
    device = models.ours.device
    batch = largest_batch(models, case, name)
    if batch < 1:
        raise UnsupportedError("expected a memory with room for the weights and one prompt")
    case = dataclasses.replace(case, batch=batch)
    way = make_way(name, models, case)
    assert isinstance(way, Ours)
    tokens, steps = torch.zeros(batch, dtype=torch.int64, device=device), case.new_tokens - 1
    before = peak_since(device)
    way.fill()
    way.decode(tokens, steps)  # the graph is captured
    times = []
    for _ in range(runs):
        begin = now(device)
        way.decode(tokens, steps)
        times.append((now(device) - begin) * 1e3 / steps)
    step, profiled = statistics.median(times), min(PROFILED, steps)
    return {
        **of_case(case, way, models.shape),
        "way": name,
        "memory_bytes": case.memory,
        "ms_per_token": round(step, 3),
        "decode_tokens_per_second": round(batch * 1e3 / step, 1),
        "cache_bytes": way.cache_bytes,
        "peak_bytes": None if before is None else before() + way.weight_bytes,
        "step": device_time(lambda: way.decode(tokens, profiled), device, profiled),
    }
