"""The current stream and device are the ones used, and no op waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases.run import tensors
from cases.segment_tables import image_stage
from gpu_device import DEVICE, DRY_RUN, another_stream, hold_back, on_device, to_device
from torch import Tensor

from adsc_kernels import ops

STAGE = to_device(image_stage(2))
ROWS = STAGE.num_tokens_in
WEIGHT = torch.ones(256, device=DEVICE)
BOUNDS, SPANS = on_device([0, 677, 1354]), on_device([[0, 50, 576], [1, 50, 576]])

CALLS: dict[str, Callable[[Tensor], object]] = {
    "downsample": lambda x: ops.downsample(x, STAGE),
    "downsample_many": lambda x: ops.downsample_many([x, x[:, 0].contiguous()], STAGE),
    "downsample_add_rms_norm": lambda x: ops.downsample_add_rms_norm(x, x, WEIGHT, STAGE),
    "keep_indices": lambda x: ops.downsample(x, keep_indices=SPANS[:, 1].contiguous()),
    "rebuild_metadata": lambda x: ops.rebuild_metadata(BOUNDS, SPANS, "1/4"),
    "boundary_step": lambda x: ops.boundary_step(x, STAGE, residual=x, weight=WEIGHT, others=[x]),
}


@pytest.mark.parametrize("name", CALLS)
def test_current_stream(name: str) -> None:
    """x gets its values on the stream, late: a launch on any other stream would miss them."""
    call, new = CALLS[name], torch.randn(ROWS, 256, device=DEVICE)
    wanted = tensors(call(new))
    x = torch.zeros_like(new)
    torch.zeros(1, device=DEVICE).item()  # all of this is done before the stream begins
    with another_stream():
        hold_back(30)
        x.copy_(new)
        got = tensors(call(x))
    for mine, truth in zip(got, wanted, strict=True):
        assert torch.equal(mine, truth)


@pytest.mark.parametrize("name", CALLS)
def test_never_waits_for_the_device(name: str) -> None:
    if DRY_RUN:
        pytest.skip("there is no device to wait for")
    call, x = CALLS[name], torch.randn(ROWS, 256, device=DEVICE)
    call(x)
    torch.cuda.synchronize()
    hold_back(300)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(x)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    done = torch.cuda.Event()
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


def test_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda", 1)
    stage = replace(STAGE, segments=STAGE.segments.to(other))
    x = torch.randn(ROWS, 256, device=other)
    assert torch.cuda.current_device() == 0
    out = ops.downsample(x, stage)
    assert out.device == other
    assert torch.equal(out.to(DEVICE), ops.downsample(x.to(DEVICE), STAGE))
    assert torch.cuda.current_device() == 0
