"""downsample and downsample_many beside index_select with its indices on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from gpu_shapes import BATCHES, Batch
from gpu_timing import DEVICE, DRY_RUN, Case, Run
from torch import Tensor

from adsc_kernels import ops

HEAD = 128


def moved_bytes(batch: Batch, row_bytes: int) -> int:
    return 2 * batch.stage().num_tokens * row_bytes


def given_rows(rows: Tensor) -> dict[str, Run]:
    """Gathers that need not find their rows: our kernel's, and a plain one."""
    rows = rows.int()
    found: dict[str, Run] = {"cuda by int32 rows": lambda x: ops.downsample(x, keep_indices=rows)}
    if DRY_RUN and len(rows) > 50:  # a minute for Triton's interpreter
        return found
    with contextlib.suppress(ImportError):  # without Triton
        from plain_kernels import gather

        def plain(x: Tensor) -> Tensor:
            out = x.new_empty(len(rows), x.shape[1])
            gather(out.view(torch.int64), x.view(torch.int64), rows)
            return out

        found["gather kernel"] = plain
    return found


def downsample(batch: Batch) -> Iterator[Case]:
    stage = batch.stage()
    rows = stage.keep_indices()

    def make() -> Tensor:
        return torch.randn(stage.num_tokens_in, batch.hidden, device=DEVICE, dtype=torch.bfloat16)

    baselines: dict[str, Run] = {"eager": lambda x: torch.index_select(x, 0, rows)}
    size = moved_bytes(batch, 2 * batch.hidden)
    yield Case(
        "downsample",
        batch.name,
        size,
        make,
        lambda x: ops.downsample(x, stage),
        {**baselines, **given_rows(rows)},
        compiled=batch.compiled,
        telling=batch.telling,
    )
    if batch.compiled:
        yield Case(
            "downsample",
            f"{batch.name}, keep_indices",
            size,
            make,
            lambda x: ops.downsample(x, keep_indices=rows),
            baselines,
        )


def downsample_many(batch: Batch) -> Case:
    """Hidden states, residual, positions and the two RoPE tables."""
    stage = batch.stage()
    rows = stage.keep_indices()

    def make() -> list[Tensor]:
        count = stage.num_tokens_in
        return [
            *torch.randn(2, count, batch.hidden, device=DEVICE, dtype=torch.bfloat16).unbind(),
            torch.randint(0, 1 << 40, (count,), device=DEVICE),
            *torch.randn(2, count, HEAD, device=DEVICE, dtype=torch.bfloat16).unbind(),
        ]

    return Case(
        "downsample_many",
        batch.name,
        moved_bytes(batch, 2 * 2 * batch.hidden + 8 + 2 * 2 * HEAD),
        make,
        lambda xs: ops.downsample_many(xs, stage),
        {"eager": lambda xs: [torch.index_select(x, 0, rows) for x in xs]},
        compiled=batch.compiled,
    )


def cases() -> Iterator[Case]:
    for batch in BATCHES:
        yield from downsample(batch)
        yield downsample_many(batch)
