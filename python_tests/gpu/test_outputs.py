"""Nothing but its outputs is written by an op: all free memory around them keeps its sentinels.

The op allocates from a pool of this test's own, whose memory is filled with sentinels just before;
afterwards the whole pool is read back, outputs and the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases.run import tensors
from cases.segment_tables import image_stage
from gpu_device import BACKEND, DEVICE, DRY_RUN, SENTINEL, on_device, to_device
from torch import Tensor

from adsc_kernels import ops

WIDTHS = (1, 3, 33, 512, 4096, 4099)
SMALL, LARGE = 1 << 20, 64 << 20  # the allocator keeps a pool for requests up to 1 MiB
STAGE = to_device(image_stage(3, text=11, vision=25, kept=7))
ROWS = STAGE.num_tokens_in
BOUNDS, SPANS = on_device([0, 36, 72, 108]), on_device([[b, 5, 25] for b in range(3)])


class _Memory:
    """Bytes at an address, allocated or not, as a tensor."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 2,
        }  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> tuple[object, list[Tensor]]:
    """A pool that has one large and one small free block, and their bytes."""
    if DRY_RUN:
        return None, [torch.empty(SMALL, dtype=torch.uint8)]
    own = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(own):
        kept = [torch.empty(n, dtype=torch.uint8, device=DEVICE) for n in (SMALL, SMALL, LARGE)]
    bytes_of = [torch.as_tensor(_Memory(t.data_ptr(), t.numel()), device=DEVICE) for t in kept]
    assert [b.data_ptr() for b in bytes_of] == [t.data_ptr() for t in kept]
    return own, bytes_of


def call_of(op: str, width: int, dtype: torch.dtype) -> Callable[[], object]:
    """The op on new rows."""
    x, residual = torch.randn(2, ROWS, width, device=DEVICE).to(dtype).unbind()
    weight, positions = residual[0].clone(), torch.arange(ROWS, device=DEVICE)
    narrow = positions.byte()
    return {
        "downsample": lambda: ops.downsample(x, STAGE),
        "downsample_many": lambda: ops.downsample_many([narrow, x, positions, residual], STAGE),
        "downsample_add_rms_norm": lambda: ops.downsample_add_rms_norm(x, residual, weight, STAGE),
        "rebuild_metadata": lambda: ops.rebuild_metadata(BOUNDS, SPANS, "1/4", "center"),
        "boundary_step": lambda: ops.boundary_step(
            x,
            residual=residual,
            weight=weight,
            others=[positions, narrow],
            layout=ops.BatchLayout(BOUNDS, SPANS, "1/4", num_tokens=ROWS),
        ),
    }[op]


CASES = [
    *(("downsample", n, t) for n in WIDTHS for t in (torch.uint8, torch.float32, torch.complex128)),
    *(("downsample_many", width, torch.int16) for width in WIDTHS),
    *(("downsample_add_rms_norm", width, torch.bfloat16) for width in WIDTHS),
    *(("boundary_step", width, torch.bfloat16) for width in WIDTHS),
    ("rebuild_metadata", 1, torch.float32),
]


@pytest.mark.parametrize(("op", "width", "dtype"), CASES)
def test_only_outputs_are_written(
    op: str, width: int, dtype: torch.dtype, pool: tuple[object, list[Tensor]]
) -> None:
    own, memory = pool
    call = call_of(op, width, dtype)
    wanted = [t.cpu() for t in tensors(call())]
    for block in memory:
        block.fill_(SENTINEL)
    if DRY_RUN:
        assert all(torch.equal(a, b) for a, b in zip(tensors(call()), wanted, strict=True))
        return
    with torch.cuda.use_mem_pool(own):
        got = tensors(call())
    torch.cuda.synchronize()
    untouched = [torch.ones_like(block, dtype=torch.bool) for block in memory]
    for out, truth in zip(got, wanted, strict=True):
        assert torch.equal(out.cpu(), truth)
        inside = [
            (mask, out.data_ptr() - block.data_ptr())
            for mask, block in zip(untouched, memory, strict=True)
            if 0 <= out.data_ptr() - block.data_ptr() < block.numel()
        ]
        assert inside, f"{BACKEND}: an output outside of the pool's blocks: this test is blind"
        for mask, start in inside:
            mask[start : start + out.nbytes] = False
    for block, mask in zip(memory, untouched, strict=True):
        assert bool((block[mask] == SENTINEL).all())
