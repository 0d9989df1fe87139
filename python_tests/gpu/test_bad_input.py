"""The tables of refused calls, with tensors on the device: the same errors, before a launch.

Left out are those that only the contents of a table or an index list show: they are checked on
CPU, and on the device with ADSC_CHECK=1 (test_traps.py).
"""

from __future__ import annotations

import pytest
import torch
from cases.downsample import check_no_rows
from gpu_device import DEVICE, cases_here, run_here

from adsc_kernels import ops

CONTENTS = {
    "first dst", "dst falls", "dst past the end", "too few kept", "first too large",
    "first negative", "keep past span", "keep zero", "pattern", "source before x", "source past x",
    "num_tokens", "index negative", "index past x", "index huge", "table",
}  # fmt: skip
CONTENTS_OF_LAYOUT = {
    "cu_seqlens first", "cu_seqlens falls", "spans sequence", "spans negative sequence",
    "spans order", "spans overlap", "spans start", "spans length", "spans leave", "spans size",
    "spans height",
}  # fmt: skip

pytestmark = pytest.mark.every_case
downsample = cases_here("refused.downsample")
norm = cases_here("refused.downsample_add_rms_norm")
metadata = cases_here("refused.rebuild_metadata")


def here(message: str) -> str:
    return message.replace("cpu", f"{DEVICE.type}(:0)?")


@pytest.mark.parametrize("name", [name for name in downsample.BAD_CALLS if name not in CONTENTS])
def test_downsample(name: str) -> None:
    call, error, message = downsample.BAD_CALLS[name]
    if name == "index into nothing":
        message = "^keep_indices: "
    with DEVICE, pytest.raises(error, match=here(message)):
        call()


@pytest.mark.parametrize("name", [name for name in norm.BAD_CALLS if name not in CONTENTS])
def test_downsample_add_rms_norm(name: str) -> None:
    call, error, message = norm.BAD_CALLS[name]
    with DEVICE, pytest.raises(error, match=here(message)):
        call()


@pytest.mark.parametrize(
    "name", [name for name in metadata.BAD_CALLS if name not in CONTENTS_OF_LAYOUT]
)
def test_rebuild_metadata(name: str) -> None:
    arguments, error, message = metadata.BAD_CALLS[name]
    if name == "pattern":
        assert arguments[3] == "random"
    with pytest.raises(error, match=here(message)):
        ops.rebuild_metadata(*arguments)


def test_mixed_devices() -> None:
    other = "meta" if DEVICE.type == "cpu" else "cpu"
    x, weight = torch.zeros(7, 4, device=DEVICE), torch.ones(4, device=DEVICE)
    rows = torch.tensor([0, 3])
    there = rows.to(other)
    with pytest.raises(ValueError, match=r"^keep_indices: .*device"):
        ops.downsample(x, keep_indices=there)
    with pytest.raises(ValueError, match=r"^xs\[1\]: .*device"):
        ops.downsample_many([x, x.to(other)], keep_indices=rows.to(DEVICE))
    for arguments in ((x, x.to(other), weight), (x, x, weight.to(other))):
        with pytest.raises(ValueError, match=r"^(residual|weight): .*device"):
            ops.downsample_add_rms_norm(*arguments, keep_indices=rows.to(DEVICE))


def test_empty_everything() -> None:
    check_no_rows(run_here)
