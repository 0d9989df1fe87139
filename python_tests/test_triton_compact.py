"""The Triton compaction kernels compiled for sm_80 and sm_90, with no GPU: no spills, 128-bit
accesses, a barrier between the loads and the stores of a tile. See triton_ahead.py.
"""

import re

import pytest
import torch
from cases.plans import image_plan

pytest.importorskip("triton")

from triton_ahead import ahead_of_time

from adsc_kernels.triton import compact

STAGE = image_plan(2, text=35, vision=576, tail=66)
ROWS = (STAGE.segments, None, STAGE.cu_seqlens, STAGE.cu_seqlens_in, None, None)
INDICES = (
    None,
    STAGE.keep_indices()[None, None],
    STAGE.cu_seqlens,
    STAGE.cu_seqlens_in,
    None,
    None,
)
TABLE = torch.arange(2 * 48, dtype=torch.int32).reshape(2, 48)
BATCHED = [torch.zeros(2, 700, 8, 128, dtype=torch.bfloat16) for _ in range(4)]
HEADS = [x.transpose(1, 2).contiguous() for x in BATCHED]
BLOCKS = [torch.zeros(96, 16, 8, 128, dtype=torch.bfloat16) for _ in range(4)]
BYTES = [torch.zeros(96, 16, 8, 63, dtype=torch.uint8)[..., 1:] for _ in range(2)]

LAUNCHES = {
    "batched": (lambda: compact.compact_kv_(BATCHED, 2, *ROWS, None, "NHD"), 80, 128),
    "heads": (lambda: compact.compact_kv_(HEADS, 2, *INDICES, None, "HND"), 90, 128),
    "paged": (
        lambda: compact.compact_paged_kv_(BLOCKS, 2, TABLE, 16, *ROWS, True, None, "NHD"),
        90,
        128,
    ),
    "bytes": (
        lambda: compact.compact_paged_kv_(BYTES, 1, TABLE, 16, *INDICES, False, None, "NHD"),
        80,
        8,
    ),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_compact(name: str) -> None:
    run, arch, widest = LAUNCHES[name]
    with ahead_of_time(arch) as kernels:
        run()
    assert [kernel.name for kernel in kernels] == ["compact_kernel", "outputs_kernel"]
    for kernel in kernels:
        assert kernel.stack == 0, kernel
        assert kernel.spills == 0, kernel
    moving = kernels[0]
    assert max(moving.widths("st")) == widest
    assert widest in moving.widths("ld")
    # In a turn of the loop the payload's loads come first, then the barrier, then its stores.
    order = re.findall(r"(ld\.global\S*|bar\.sync|st\.global)", moving.ptx)
    stores = [i for i, word in enumerate(order) if word == "st.global"]
    assert stores
    assert "bar.sync" in order[: stores[0]]
    between = order[max(i for i in range(stores[0]) if order[i] == "bar.sync") : stores[-1]]
    assert not any(word.startswith("ld") for word in between)


def test_check() -> None:
    read_only = torch.tensor([0, 1])
    with ahead_of_time(80) as kernels:
        compact.compact_paged_kv_(BLOCKS, 2, TABLE, 16, *ROWS, True, read_only, "NHD")
    names = ["mark_read_only_kernel", "check_kernel", "compact_kernel", "outputs_kernel"]
    assert [kernel.name for kernel in kernels] == names
    assert "__assertfail" in kernels[1].ptx
    assert not any("__assertfail" in kernel.ptx for kernel in kernels if kernel is not kernels[1])
