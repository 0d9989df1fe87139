"""More than 2^31 elements and bytes, far strides, more rows and segments than a grid is wide."""

from __future__ import annotations

import pytest
import torch
from cases.segment_tables import FakeStage, stage_of
from gpu_device import BACKEND, DEVICE, DRY_RUN, on_device, to_device
from torch import Tensor
from torch.nn.functional import rms_norm

from adsc_kernels import CompressionSchedule, make_plan, ops

MANY = 1 << (14 if DRY_RUN else 31)


def late_stage(rows: int) -> tuple[FakeStage, Tensor]:
    """A row dropped here and there, nearly all kept, every second of the last twenty; and which."""
    end = rows - 20
    table = [[0, 0, 40, 1, 0, 0], [1, 40, end - 40, end - 40, 0, 0], [end - 39, end, 20, 10, 0, 0]]
    kept = torch.cat([torch.tensor([0]), torch.arange(40, end), torch.arange(end, rows, 2)])
    return to_device(stage_of(table, end - 29, rows)), kept.to(DEVICE)


def counted(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Numbers that tell rows and columns apart, without a second tensor of that size."""
    x = torch.empty(rows, width, dtype=dtype, device=DEVICE)
    across = torch.arange(width, device=DEVICE)
    for begin in range(0, rows, 4096):
        down = torch.arange(begin, min(begin + 4096, rows), device=DEVICE)
        x[begin : begin + 4096] = ((down[:, None] * 7 + across * 3) % 251).to(dtype)
    return x


@pytest.mark.parametrize(
    ("width", "dtype"), [(1 << 10, torch.uint8), (4096, torch.bfloat16), (4097, torch.uint8)]
)
def test_downsample(width: int, dtype: torch.dtype) -> None:
    rows = MANY // width + 64
    stage, kept = late_stage(rows)
    x = counted(rows, width, dtype)
    assert torch.equal(ops.downsample(x, stage), x[kept])
    assert torch.equal(ops.downsample(x, keep_indices=kept), x[kept])
    outs = ops.downsample_many([x, kept.new_ones(rows), x], stage)
    assert torch.equal(outs[0], x[kept])
    assert torch.equal(outs[2], outs[0])


def test_downsample_add_rms_norm() -> None:
    width = 4096
    rows = MANY // width + 64
    stage, kept = late_stage(rows)
    x = counted(rows, width, torch.bfloat16)
    weight = torch.rand(width, device=DEVICE, dtype=torch.bfloat16)
    normed, summed = ops.downsample_add_rms_norm(x, x, weight, stage)
    for part in (slice(0, 100), slice(stage.num_tokens - 100, None)):
        assert torch.equal(summed[part], x[kept[part]] * 2)
        wanted = rms_norm(summed[part], (width,), weight, 1e-6)
        torch.testing.assert_close(normed[part], wanted)


def test_upsample_grad() -> None:
    width = 4096
    rows = MANY // width + 64
    stage, kept = late_stage(rows)
    x = torch.zeros(rows, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    grad = counted(stage.num_tokens, width, torch.bfloat16)
    ops.downsample(x, stage).backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad[kept], grad)
    dropped = torch.ones(rows, dtype=torch.bool, device=DEVICE)
    dropped[kept] = False
    assert not x.grad[dropped].any()


def test_rows_far_apart() -> None:
    """A stride that takes the last row past 2^32 bytes."""
    stride = MANY
    storage = torch.zeros(2 * stride + 64, dtype=torch.uint8, device=DEVICE)
    x = storage.as_strided((3, 8), (stride, 1))
    x[0], x[2] = 1, 7
    out = ops.downsample(x, keep_indices=on_device([2, 0]))
    assert out[:, 0].tolist() == [7, 1]


def test_many_rows_of_positions() -> None:
    rows = 1 << (10 if DRY_RUN else 23)
    positions = torch.randint(0, 1 << 40, (rows,), device=DEVICE)
    stage = to_device(stage_of([[0, 0, rows, rows // 3 + 1, 0, 2]], rows // 3 + 1, rows))
    m = rows // 3 + 1
    j = torch.arange(m, device=DEVICE)
    kept = (2 * j * (rows - 1) + m - 1) // (2 * (m - 1))
    assert torch.equal(ops.downsample(positions, stage), positions[kept])


def test_many_segments() -> None:
    count = 100 if DRY_RUN else 100_000
    schedule = CompressionSchedule.parse("1:1/4", num_layers=2)
    bounds = [b * 20 for b in range(count + 1)]
    spans = [(b, b % 5, 11 + b % 4) for b in range(count)]
    stage = make_plan(schedule, bounds, spans, device=DEVICE).stages[1]
    x = torch.randn(bounds[-1], 16, device=DEVICE)
    assert torch.equal(ops.downsample(x, stage), x[stage.keep_indices()])


def test_allocates_its_outputs_and_nothing_else() -> None:
    if DRY_RUN:
        pytest.skip("counts CUDA memory")
    rows, width = 4000, 4096
    stage, _ = late_stage(rows)
    x = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16)
    weight, positions = x[0].clone(), torch.arange(rows, device=DEVICE)
    for run in (
        lambda: [ops.downsample(x, stage)],
        lambda: ops.downsample_many([x, positions, x], stage),
        lambda: ops.downsample_add_rms_norm(x, x, weight, stage),
    ):
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outputs = run()
        more = torch.cuda.max_memory_allocated() - before - sum(out.nbytes for out in outputs)
        assert more <= 4096, (BACKEND, more)
