"""The Triton kernels compiled for sm_80 and sm_90, with no GPU: no spills, 128-bit accesses.

What is compiled is what the launchers pick: see triton_ahead.py.
"""

import pytest
import torch
from segment_tables import image_stage

pytest.importorskip("triton")

from triton_ahead import Kernel, ahead_of_time

from adsc_kernels.triton import downsample, metadata, norm, upsample_grad

ARCHITECTURES = [80, 90]
STAGE = image_stage(2)
T = STAGE.num_tokens_in
TABLE = (STAGE.segments, None, STAGE.num_tokens)
HIDDEN = torch.zeros(T, 4096, dtype=torch.bfloat16)
POSITIONS = torch.arange(T)
ROWS = torch.arange(10)


def check(kernel: Kernel, widest: int) -> None:
    """widest: bits of the widest load and store that the payload allows; 0: no matter."""
    assert kernel.stack == 0, kernel
    assert kernel.spills == 0, kernel
    assert widest == 0 or max(kernel.widths("st")) == widest, kernel
    assert widest == 0 or widest in kernel.widths("ld"), kernel
    if widest == 128:
        assert "LDG.E.128" in kernel.sass
        assert "STG.E.128" in kernel.sass


def each(arch: int, launches: dict) -> None:
    for name, (run, widest) in launches.items():
        with ahead_of_time(arch) as kernels:
            run()
        assert kernels, name
        for kernel in kernels[:-1]:
            check(kernel, 0)
        check(kernels[-1], widest)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_downsample(arch: int) -> None:
    def tiny(*shape: int) -> torch.Tensor:
        return torch.zeros(T, *shape, dtype=torch.int8)

    each(
        arch,
        {
            "hidden": (lambda: downsample.downsample(HIDDEN, *TABLE), 128),
            "hidden, indices": (lambda: downsample.downsample(HIDDEN, None, ROWS, 10), 128),
            "odd multiple of 16 bytes": (
                lambda: downsample.downsample(HIDDEN[:, :4088].clone(), None, ROWS.int(), 10),
                128,
            ),
            "8 bytes": (lambda: downsample.downsample(HIDDEN[:, 4:4088], *TABLE), 64),
            "4 bytes": (lambda: downsample.downsample(HIDDEN[:, 2:], *TABLE), 32),
            "2 bytes": (lambda: downsample.downsample(HIDDEN[:, 1:], *TABLE), 16),
            "positions": (lambda: downsample.downsample(POSITIONS, *TABLE), 64),
            "3 bytes": (lambda: downsample.downsample(tiny(3), *TABLE), 8),
            "many": (
                lambda: downsample.downsample_many([HIDDEN, HIDDEN, POSITIONS, tiny(32)], *TABLE),
                128,
            ),
        },
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_norm(arch: int) -> None:
    def run(width: int, dtype: torch.dtype, cut: int = 0) -> None:
        x = torch.zeros(T, width + cut, dtype=dtype)[:, :width]
        norm.downsample_add_rms_norm(x, x, torch.zeros(width, dtype=dtype), *TABLE, 1e-6)

    each(
        arch,
        {
            "bfloat16": (lambda: run(4096, torch.bfloat16), 128),
            "float16, not a power of two": (lambda: run(5120, torch.float16), 128),
            "float32": (lambda: run(4096, torch.float32), 128),
            "float64": (lambda: run(4096, torch.float64), 128),
            "more than a block": (lambda: run(20480, torch.bfloat16), 128),
            "more than a block of float64": (lambda: run(5120, torch.float64), 128),
            "strides of 8 bytes": (lambda: run(4096, torch.bfloat16, cut=4), 0),
            "narrow": (lambda: run(33, torch.float32), 32),
        },
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rebuild_metadata(arch: int) -> None:
    def run(batch: int, grid: bool) -> None:
        cu_seqlens, spans = torch.zeros(batch + 1).int(), torch.zeros(batch, 5).int()
        keep = [1, 2, 1, 2] if grid else [1, 4]
        metadata.rebuild_metadata(cu_seqlens, spans, keep, "grid" if grid else "start", 24)

    for batch in (128, 129):
        each(arch, {f"{batch}, {grid}": (lambda b=batch, g=grid: run(b, g), 0) for grid in (0, 1)})


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_upsample_grad(arch: int) -> None:
    def run(grad: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        upsample_grad.upsample_grad(grad, None if rows is not None else STAGE.segments, rows, T)

    tokens = STAGE.num_tokens
    each(
        arch,
        {
            "bfloat16": (lambda: run(torch.zeros(tokens, 4096, dtype=torch.bfloat16)), 128),
            "float32, indices": (lambda: run(torch.zeros(10, 4096), ROWS), 128),
            "float64": (lambda: run(torch.zeros(tokens, 64, dtype=torch.float64)), 128),
            "narrow": (lambda: run(torch.zeros(tokens, 3)), 32),
        },
    )
