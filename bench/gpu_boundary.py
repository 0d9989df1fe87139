"""What happens at a boundary: downsample_add_rms_norm, rebuild_metadata and boundary_step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from gpu_shapes import BATCHES, TEXT, VISION, Batch
from gpu_timing import DEVICE, DRY_RUN, Case, Run
from torch import Tensor
from torch.nn.functional import rms_norm

from adsc_kernels import ops

EPS = 1e-6
HEAD = 128
CLOSE = 0.05  # two roundings to bfloat16 apart


def rows_and_weight(batch: Batch, count: int) -> list[Tensor]:
    options = {"device": DEVICE, "dtype": torch.bfloat16}
    x, residual = torch.randn(2, count, batch.hidden, **options).unbind()
    return [x, residual, torch.rand(batch.hidden, **options)]


def norm_bytes(batch: Batch, rows: int) -> int:
    """Two rows read, two written; the weight stays in the cache."""
    return 4 * rows * batch.hidden * 2


def engines(rows: Tensor) -> dict[str, Run]:
    """index_select, and an engine's own fused sum and norm in place, where one is installed."""

    def behind_index_select(norm: Callable[..., object]) -> Run:
        def run(buffers: list[Tensor]) -> tuple[Tensor, Tensor]:
            x, residual, weight = buffers
            x, residual = (torch.index_select(t, 0, rows) for t in (x, residual))
            norm(x, residual, weight, EPS)
            return x, residual

        return run

    found = {}
    with contextlib.suppress(ImportError):
        from flashinfer.norm import fused_add_rmsnorm

        found["flashinfer"] = behind_index_select(fused_add_rmsnorm)
    with contextlib.suppress(ImportError):
        from vllm._custom_ops import fused_add_rms_norm

        found["vllm"] = behind_index_select(fused_add_rms_norm)
    return found


def add_rms_norm(batch: Batch) -> Case:
    stage = batch.stage()
    rows = stage.keep_indices()

    def eager(buffers: list[Tensor]) -> tuple[Tensor, Tensor]:
        x, residual, weight = buffers
        summed = torch.index_select(x, 0, rows) + torch.index_select(residual, 0, rows)
        return rms_norm(summed, weight.shape, weight, EPS), summed

    return Case(
        "downsample_add_rms_norm",
        batch.name,
        norm_bytes(batch, stage.num_tokens),
        lambda: rows_and_weight(batch, stage.num_tokens_in),
        lambda buffers: ops.downsample_add_rms_norm(*buffers, stage, EPS),
        {"eager": eager, **engines(rows)},
        compiled=batch.compiled,
        telling=batch.telling,
        tolerance=CLOSE,
    )


def boundary_step(batch: Batch) -> Iterator[Case]:
    """The whole step of a decoder: sum and norm, positions, and the two RoPE tables. Given the
    plan's stage, and given the layout on the device, which the same launch then rebuilds; PyTorch
    has the indices either way, and in the second case the metadata too."""
    stage = batch.stage()
    rows = stage.keep_indices()
    bounds, spans = (
        torch.tensor(t, dtype=torch.int32, device=DEVICE).contiguous() for t in batch.layout()
    )
    layout = ops.BatchLayout(bounds, spans, "1/4", num_tokens=stage.num_tokens)

    def make() -> list[Tensor]:
        count = stage.num_tokens_in
        tables = torch.randn(2, count, HEAD, device=DEVICE, dtype=torch.bfloat16)
        positions = torch.randint(0, 1 << 40, (count,), device=DEVICE)
        return [*rows_and_weight(batch, count), positions, *tables.unbind()]

    def ours(buffers: list[Tensor], **where: object) -> list[Tensor]:
        x, residual, weight, *others = buffers
        step = ops.boundary_step(
            x, residual=residual, weight=weight, eps=EPS, others=others, **where
        )
        return [step.hidden, step.residual, *step.others]

    def eager(buffers: list[Tensor]) -> list[Tensor]:
        x, residual, weight, *others = buffers
        summed = torch.index_select(x, 0, rows) + torch.index_select(residual, 0, rows)
        normed = rms_norm(summed, weight.shape, weight, EPS)
        return [normed, summed, *(torch.index_select(other, 0, rows) for other in others)]

    size = norm_bytes(batch, stage.num_tokens) + 2 * stage.num_tokens * (8 + 2 * 2 * HEAD)
    yield Case(
        "boundary_step",
        batch.name,
        size,
        make,
        lambda buffers: ours(buffers, stage=stage),
        {"eager": eager},
        compiled=batch.compiled,
        telling=batch.telling,
        tolerance=CLOSE,
    )
    yield Case(
        "boundary_step",
        f"{batch.name}, layout",
        size,
        make,
        lambda buffers: ours(buffers, layout=layout),
        {"eager": eager},
        telling=batch.telling,
        tolerance=CLOSE,
    )


def rebuild_metadata(sequences: int) -> Case:
    """One picture in each of so many sequences, beside the same in vectorised PyTorch."""
    length = TEXT + VISION
    options = {"dtype": torch.int32, "device": DEVICE}

    def make() -> tuple[Tensor, Tensor]:
        bounds = torch.arange(sequences + 1, **options) * length
        spans = torch.tensor([[TEXT // 3, VISION]], **options).expand(sequences, -1)
        return bounds, torch.cat([torch.arange(sequences, **options)[:, None], spans], 1)

    def eager(buffers: tuple[Tensor, Tensor]) -> list[Tensor]:
        """For exactly one span in each sequence, which is less than the op does."""
        bounds, spans = buffers
        _, start, count = spans.unbind(1)
        keep = (count + 3) // 4
        first = bounds[:-1]
        after = bounds.diff() - start - count
        lens = start + keep + after
        ends = lens.cumsum(0, dtype=torch.int32)
        begin = ends - lens
        zero = torch.zeros_like(start)
        table = torch.stack(
            [
                torch.stack([begin, first, start, start, zero, zero], 1),
                torch.stack([begin + start, first + start, count, keep, zero, zero], 1),
                torch.stack(
                    [begin + start + keep, first + start + count, after, after, zero, zero], 1
                ),
            ],
            1,
        ).flatten(0, 1)
        new_spans = torch.stack([spans[:, 0], start, keep], 1)
        return [torch.cat([zero[:1], ends]), new_spans, table, lens, ends[-1], lens.max()]

    return Case(
        "rebuild_metadata",
        f"{sequences} sequences",
        4 * (sequences * (1 + 3 + 1 + 3 + 3 * 6 + 1) + 4),
        make,
        lambda buffers: ops.rebuild_metadata(*buffers, "1/4"),
        {"eager": eager},
        compiled=sequences in (32, 8192),
        telling=True,
    )


def cases() -> Iterator[Case]:
    for sequences in (1, 4) if DRY_RUN else (1, 32, 1024, 8192):
        yield rebuild_metadata(sequences)
    for batch in BATCHES:
        yield add_rms_norm(batch)
        yield from boundary_step(batch)
