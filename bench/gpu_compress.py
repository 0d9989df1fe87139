"""compress_step beside the two ops that it joins, and beside PyTorch.

The first boundary of LLaVA-1.5-7B and -13B after prompts of one picture: sum, norm and positions of
the rows, and the caches of the eight layers in front of it, K and V. A call moves the same rows
whatever they hold, so it is timed again and again over the same buffers. Bytes count rows that
change places only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from gpu_boundary import EPS, norm_bytes, rows_and_weight
from gpu_shapes import LLAVA_13B, TEXT, VISION, Batch
from gpu_timing import DEVICE, DRY_RUN, Case
from torch import Tensor
from torch.nn.functional import rms_norm

from adsc_kernels import ops

LAYERS, HEAD = (2, 8) if DRY_RUN else (8, 128)  # in front of the boundary
LENGTH = TEXT + VISION
# Rows and positions; K; V; the object of those
Buffers = tuple[list[Tensor], list[Tensor], list[Tensor], ops.DenseCache]


def step(batch: Batch, telling: bool) -> Iterator[Case]:
    stage = batch.stage()
    heads = batch.hidden // HEAD
    kept = stage.keep_indices()
    old = stage.source_rows()[: stage.seq_lens[0]]
    moving = int((old != np.arange(len(old))).sum()) * batch.sequences
    by_row = torch.from_numpy(old).to(DEVICE)

    def make() -> Buffers:
        rows = rows_and_weight(batch, stage.num_tokens_in)
        positions = torch.arange(stage.num_tokens_in, device=DEVICE)
        shape = (batch.sequences, LENGTH, heads, HEAD)

        def cache() -> Tensor:
            return torch.randint(-9, 9, shape, device=DEVICE, dtype=torch.int8).bfloat16()

        layers = range(LAYERS)
        k, v = [cache() for _ in layers], [cache() for _ in layers]
        return [*rows, positions], k, v, ops.DenseCache(k, v)

    def boundary(rows: list[Tensor]) -> dict[str, object]:
        _, residual, weight, positions = rows
        return {"residual": residual, "weight": weight, "eps": EPS, "others": [positions]}

    def fused(buffers: Buffers) -> None:
        rows, _, _, caches = buffers
        ops.compress_step(rows[0], caches, stage, **boundary(rows))

    def pair(buffers: Buffers) -> None:
        rows, _, _, caches = buffers
        ops.boundary_step(rows[0], stage, **boundary(rows))
        ops.compact_kv_(caches, stage=stage)

    def eager(buffers: Buffers) -> None:
        (x, residual, weight, positions), k, v, _ = buffers
        summed = torch.index_select(x, 0, kept) + torch.index_select(residual, 0, kept)
        rms_norm(summed, weight.shape, weight, EPS)
        torch.index_select(positions, 0, kept)
        for tensor in (*k, *v):
            rows = tensor.index_select(1, by_row)
            tensor[:, : rows.shape[1]].copy_(rows)

    row_bytes = 2 * batch.hidden
    size = norm_bytes(batch, stage.num_tokens) + 2 * 8 * stage.num_tokens
    size += 2 * moving * row_bytes * 2 * LAYERS
    for name, run in (("compress_step", fused), ("boundary_step, then compact_kv_", pair)):
        yield Case(
            name,
            f"{batch.name}, {LAYERS} layers",
            size,
            make,
            run,
            {"eager": eager},
            telling=telling,
            tolerance=None,
        )


def cases() -> Iterator[Case]:
    for sequences in (1,) if DRY_RUN else (1, 8, 32):
        yield from step(Batch(sequences), telling=sequences < 32)
    yield from step(Batch(8, LLAVA_13B), telling=False)
