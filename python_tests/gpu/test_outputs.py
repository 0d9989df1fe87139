"""Nothing but its outputs is written by an op: all free memory around them keeps its sentinels.

The op allocates from a pool of this test's own, whose memory is filled with sentinels just before;
afterwards the whole pool is read back, outputs and the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from cases.run import tensors
from cases.segment_tables import image_stage
from gpu_device import BACKEND, DEVICE, DRY_RUN, SENTINEL, on_device, to_device
from torch import Tensor

from adsc_kernels import ops

WIDTHS = (1, 3, 33, 512, 4096, 4099)
# The allocator keeps memory of its own for requests up to 1 MiB.
SMALL, LARGE = 1 << 20, (8 if DRY_RUN else 64) << 20
STAGE = to_device(image_stage(3, text=11, vision=25, kept=7))
ROWS = STAGE.num_tokens_in
BOUNDS, SPANS = on_device([0, 36, 72, 108]), on_device([[b, 5, 25] for b in range(3)])


class _Memory:
    """Bytes at an address, allocated or not, as a tensor."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 2,
        }  # fmt: skip


@dataclass
class Pool:
    """Free memory that outputs come from, as runs of bytes: an output lies in one run, whole."""

    runs: list[Tensor]
    own: object = None  # a dry run has no allocator to ask, and lays the outputs there itself

    @contextmanager
    def outputs(self) -> Iterator[list[Tensor]]:
        """Whatever is allocated in the block; in a dry run a list to be laid in the first run."""
        made: list[Tensor] = []
        if self.own is not None:
            with torch.cuda.use_mem_pool(self.own):
                yield made
            return
        yield made
        start = 0
        for i, out in enumerate(made):
            place = self.runs[0][start : start + out.nbytes]
            made[i] = place.view(out.dtype).view(out.shape).copy_(out)
            start += -(-out.nbytes // 512) * 512


def joined(blocks: list[Tensor]) -> list[tuple[int, int]]:
    """(address, bytes) of runs of blocks: the allocator joins neighbours when both are free."""
    runs: list[tuple[int, int]] = []
    for address, size in sorted((block.data_ptr(), block.nbytes) for block in blocks):
        if runs and sum(runs[-1]) == address:
            address, size = runs[-1][0], runs.pop()[1] + size
        runs.append((address, size))
    return runs


@pytest.fixture
def pool() -> Pool:
    """One of this test's own, since a failed one keeps its outputs: a large block, two small."""
    if DRY_RUN:
        memory = torch.empty(LARGE, dtype=torch.uint8)
        blocks = list(memory.split([SMALL, SMALL, LARGE - 2 * SMALL]))
        ((_, size),) = joined(blocks)
        return Pool([memory[:size]])
    own = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(own):
        kept = [torch.empty(n, dtype=torch.uint8, device=DEVICE) for n in (SMALL, SMALL, LARGE)]
    runs = [torch.as_tensor(_Memory(*run), device=DEVICE) for run in joined(kept)]
    assert [run.data_ptr() for run in runs] == [address for address, _ in joined(kept)]
    return Pool(runs, own)


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


def untouched(run: Tensor, outputs: list[Tensor]) -> Tensor:
    """Which of its bytes belong to none of the outputs."""
    mask = torch.ones_like(run, dtype=torch.bool)
    for out in outputs:
        start = out.data_ptr() - run.data_ptr()
        if 0 <= start < run.nbytes:
            assert start + out.nbytes <= run.nbytes, "an output goes on behind the pool's memory"
            mask[start : start + out.nbytes] = False
    return mask


@pytest.mark.every_case
@pytest.mark.parametrize(("op", "width", "dtype"), CASES)
def test_only_outputs_are_written(op: str, width: int, dtype: torch.dtype, pool: Pool) -> None:
    call = call_of(op, width, dtype)
    wanted = [t.cpu() for t in tensors(call())]
    for run in pool.runs:
        run.fill_(SENTINEL)
    with pool.outputs() as got:
        got += tensors(call())
    if not DRY_RUN:
        torch.cuda.synchronize()
    for out, truth in zip(got, wanted, strict=True):
        assert torch.equal(out.cpu(), truth)
    masks = [untouched(run, got) for run in pool.runs]
    found = sum(int((~mask).sum()) for mask in masks)
    assert found == sum(out.nbytes for out in got), f"{BACKEND}: an output outside of the pool"
    for run, mask in zip(pool.runs, masks, strict=True):
        assert bool((run[mask] == SENTINEL).all())
