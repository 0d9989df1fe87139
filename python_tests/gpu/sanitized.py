"""A small selection of calls to be run under compute-sanitizer; prints how many there were.

    compute-sanitizer --tool memcheck python3 python_tests/gpu/sanitized.py cuda|triton

Every input is made on the CPU and copied, and every output compared there, so that nearly all
kernels that the tool sees are this library's, and initcheck knows every byte of the inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from cases.row_bits import same_bits
from cases.run import tensors
from cases.segment_tables import FakeStage, by_stage, image_stage, stage_of
from gpu_device import DEVICE, Framed, on_device, to_device

import adsc_kernels as adsc
from adsc_kernels import ops, reference
from adsc_kernels.backend import current

STAGES = [
    image_stage(2, text=7, vision=20, kept=5),
    stage_of([[0, 3, 30, 7, 0, 1], [7, 40, 9, 9, 0, 0], [16, 40, 30, 4, 2, 2]], 18, 70),
]
# Rows of every alignment: element size, elements of a row, gap between rows, offset of the first.
ROWS = [
    (torch.uint8, 1, 0, 0), (torch.uint8, 77, 3, 1), (torch.bfloat16, 64, 0, 0),
    (torch.bfloat16, 4096, 0, 0), (torch.bfloat16, 4096, 16, 8), (torch.bfloat16, 33, 5, 3),
    (torch.int64, 1, 0, 0), (torch.float32, 130, 2, 1), (torch.complex128, 3, 0, 0),
]  # fmt: skip


def moves(stage: FakeStage) -> Iterator[tuple[object, object]]:
    """(what came out, what should) of the ops that move rows."""
    framed = [
        Framed(stage.num_tokens_in, (width,), dtype, gap=gap, offset=offset)
        for dtype, width, gap, offset in ROWS
    ]
    here = to_device(stage)
    rows = reference.source_rows(*by_stage(stage))
    for x in framed:
        wanted = reference.downsample(x.host, *by_stage(stage))
        yield ops.downsample(x.rows, here), wanted
        for width in (torch.int32, torch.int64):
            yield ops.downsample(x.rows, keep_indices=on_device(rows, width)), wanted
    wanted = reference.downsample_many([x.host for x in framed], *by_stage(stage))
    yield ops.downsample_many([x.rows for x in framed], here), wanted


def norms(stage: FakeStage) -> Iterator[tuple[object, object]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for width, gap in ((64, 0), (4096, 0), (4097, 3)):
            x, residual = torch.randn(2, stage.num_tokens_in, width).to(dtype).unbind()
            one, two = (
                Framed(*x.shape[:1], (width,), dtype, gap=gap, values=t) for t in (x, residual)
            )
            weight = torch.randn(width).to(dtype)
            wanted = reference.downsample_add_rms_norm(x, residual, weight, *by_stage(stage), 1e-6)
            arguments = (one.rows, two.rows, weight.to(one.rows.device))
            yield ops.downsample_add_rms_norm(*arguments, to_device(stage)), wanted


def gradients(stage: FakeStage) -> Iterator[tuple[object, object]]:
    op = torch.ops.adsc_triton if current() == "triton" else torch.ops.adsc_kernels
    for dtype in (torch.float32, torch.bfloat16):
        grad = torch.randn(stage.num_tokens, 65).to(dtype)
        wanted = torch.zeros(stage.num_tokens_in, 65, dtype=dtype)
        wanted[reference.source_rows(*by_stage(stage))] = grad
        table = to_device(stage).segments
        yield op.upsample_grad(grad.to(table.device), table, None, stage.num_tokens_in), wanted


def layouts() -> Iterator[tuple[object, object]]:
    bounds = torch.tensor([0, 30, 30, 75], dtype=torch.int32)
    spans = torch.tensor([[0, 3, 20, 4, 5], [2, 0, 12, 3, 4], [2, 13, 30, 5, 6]], dtype=torch.int32)
    for pattern in ("start", "center", "linspace"):
        three = spans[:, :3].contiguous()
        wanted = reference.rebuild_metadata(bounds, three, [1, 3], pattern, 0)
        yield ops.rebuild_metadata(on_device(bounds), on_device(three), "1/3", pattern), wanted
    wanted = reference.rebuild_metadata(bounds, spans, [1, 3, 1, 3], "grid", 5)
    yield (
        ops.rebuild_metadata(on_device(bounds), on_device(spans), ("1/3", "1/3"), "grid", 5),
        wanted,
    )


def caches() -> Iterator[tuple[object, object]]:
    """Compaction in place: what came out are the caches themselves."""
    schedule = adsc.CompressionSchedule.parse("1:1/3", num_layers=2)
    layout = ([0, 40, 75], [(0, 3, 30), (1, 0, 20)])
    stages = [adsc.make_plan(schedule, *layout, device).stages[1] for device in ("cpu", DEVICE)]
    table = torch.randperm(24)[:20].reshape(2, 10).int()
    for dtype, head in ((torch.uint8, 20), (torch.bfloat16, 64)):
        for edit in (None, False, True):
            shape = (75, 3, head) if edit is None else (24, 4, 3, head)
            host = [torch.randn(shape).to(dtype) for _ in range(4)]
            here = [cache.to(DEVICE) for cache in host]
            for name, caches, stage in (("reference", host, stages[0]), (None, here, stages[1])):
                with adsc.backend(name or current()):
                    if edit is None:
                        ops.compact_kv_(caches[:2], caches[2:], stage)
                    else:
                        where = table.to(caches[0].device)
                        ops.compact_paged_kv_(caches[:2], caches[2:], where, stage, edit_table=edit)
            yield here, host


def main(backend: str) -> None:
    calls = 0
    with adsc.backend(backend):
        for stage in STAGES:
            for got, wanted in (*moves(stage), *norms(stage), *gradients(stage)):
                calls += 1
                for mine, truth in zip(tensors(got), tensors(wanted), strict=True):
                    if not same_bits(mine.cpu(), truth):
                        torch.testing.assert_close(mine.cpu(), truth)
        for got, wanted in (*layouts(), *caches()):
            calls += 1
            for mine, truth in zip(tensors(got), tensors(wanted), strict=True):
                assert torch.equal(mine.cpu(), truth)
    print(f"{calls} calls")


if __name__ == "__main__":
    main(sys.argv[1])
