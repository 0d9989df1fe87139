"""The Triton kernels compiled for sm_80 and sm_90, with no GPU: no spills, 128-bit accesses.

What is compiled is what the launchers pick: see triton_ahead.py.
"""

import pytest
import torch
from segment_tables import image_stage

pytest.importorskip("triton")

from triton_ahead import Kernel, ahead_of_time

from adsc_kernels.triton import downsample

ARCHITECTURES = [80, 90]
STAGE = image_stage(2)
T = STAGE.num_tokens_in
TABLE = (STAGE.segments, None, STAGE.num_tokens)
HIDDEN = torch.zeros(T, 4096, dtype=torch.bfloat16)
POSITIONS = torch.arange(T)
ROWS = torch.arange(10)


def check(kernel: Kernel, widest: int) -> None:
    """widest: bits of the widest load and store that the payload allows."""
    assert kernel.stack == 0, kernel
    assert kernel.spills == 0, kernel
    assert max(kernel.widths("st")) == widest, kernel
    assert widest in kernel.widths("ld"), kernel
    if widest == 128:
        assert "LDG.E.128" in kernel.sass
        assert "STG.E.128" in kernel.sass


def each(arch: int, launches: dict) -> None:
    for name, (run, widest) in launches.items():
        with ahead_of_time(arch) as kernels:
            run()
        assert len(kernels) == 1, f"{name}: one launch"
        check(kernels[0], widest)


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
