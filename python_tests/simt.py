"""The CUDA kernels on a CPU: the library that csrc/tests/simt makes, and how tests steer it.

`torch.ops.adsc_simt.*` are the CUDA ops, argument checks and launchers included, on CPU tensors.
"""

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.run import Run, tensors
from hypothesis import strategies as st
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "build" / sys.implementation.cache_tag / "csrc/tests/simt/libadsc_simt.so"
CACHES = ("k_caches", "v_caches", "k_scales", "v_scales")
POISON = 0xA7  # every byte of an output, and around it, before the kernels run

needs_simt = pytest.mark.skipif(
    not LIBRARY.is_file() and not os.environ.get("CI"),
    reason="the emulator is not built: make test-cpp",
)

# Seed; how many blocks run interleaved: one after another, a few, all; and how many threads make
# the GPU busy, which is what launchers cut the work by.
Schedule = tuple[int, int, int]
schedules = st.tuples(
    st.integers(0, 2**31), st.sampled_from([1, 3, 0]), st.sampled_from([1, 2000, 132 * 1024])
)


@functools.cache
def load() -> ctypes.CDLL:
    torch.ops.load_library(str(LIBRARY))
    library = ctypes.CDLL(str(LIBRARY))
    library.adsc_simt_configure.argtypes = [
        ctypes.c_uint64,
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int,
    ]
    library.adsc_simt_allow.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


if LIBRARY.is_file():
    load()


def byte_ranges(x: Tensor) -> list[tuple[int, int]]:
    """[begin, end) of the bytes that belong to x: as many pieces as its strides make of it."""
    if x.numel() == 0:
        return []
    size = x.element_size()
    dims = sorted(zip(x.stride(), x.shape, strict=True))
    outer = []
    for stride, count in dims:
        if count > 1 and stride * x.element_size() == size:
            size *= count
        elif count > 1 and stride > 0:
            outer.append([i * stride * x.element_size() for i in range(count)])
    begins = (x.data_ptr() + sum(offsets) for offsets in product(*outer))
    return [(begin, begin + size) for begin in begins]


@contextlib.contextmanager
def emulated(
    schedule: Schedule,
    *inputs: Tensor | None,
    writable: tuple[Tensor, ...] = (),
    races: bool = True,
) -> Iterator[None]:
    """Launches may read `inputs`, read and write `writable` and outputs, and touch nothing else."""
    library = load()
    library.adsc_simt_configure(*schedule, races)
    for memory, write in ((inputs, False), (writable, True)):
        ranges = sorted({r for x in memory if x is not None for r in byte_ranges(x)})
        merged: list[tuple[int, int]] = []
        for begin, end in ranges:
            if merged and begin < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        for begin, end in merged:
            library.adsc_simt_allow(begin, end - begin, write)
    try:
        yield
    finally:
        library.adsc_simt_allow_anything()


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """The public ops (`adsc.ops.*`) on CPU tensors run the CUDA kernels, of which they call one."""
    modules = [m for name, m in sys.modules.items() if name.startswith("adsc_kernels.ops.")]
    chosen = []

    def choose(name: str, _: torch.device) -> Callable[..., Any]:
        chosen.append(name)
        return getattr(torch.ops.adsc_simt, name)

    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            if hasattr(module, "choose"):
                patch.setattr(module, "choose", choose)
            if hasattr(module, "native"):  # which would hand CPU tensors to the CPU's op
                patch.setattr(module, "native", lambda *_: None)
        yield
    assert chosen, "nothing was emulated"


def guards_intact(out: Tensor) -> bool:
    """Whether what lies around an output is as it was."""
    data = torch.empty(0, dtype=torch.uint8).set_(out.untyped_storage())
    begin = out.storage_offset() * out.element_size()
    end = begin + out.numel() * out.element_size()
    return bool((data[:begin] == POISON).all() and (data[end:] == POISON).all())


def emulating(schedule: Schedule) -> Run:
    """By the CUDA kernels, which may read the tensors of the call and nothing else."""

    def run(op: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        inputs = reachable([*arguments, *options.values()])
        with serving(), emulated(schedule, *inputs):
            out = op(*arguments, **options)
        assert all(map(guards_intact, tensors(out)))
        return out

    return run


def emulating_in_place(schedule: Schedule, *outs: Tensor) -> Run:
    """By the CUDA kernels, which may write the caches of the call, and `outs`."""

    def run(op: Callable[..., Any], **options: Any) -> Any:
        given = list(options.items())
        if "cache" in options:
            given += vars(options["cache"]).items()
        caches = [x for name, value in given if name in CACHES for x in value or []]
        inputs = reachable([value for name, value in given if name not in CACHES])
        with serving(), emulated(schedule, *inputs, writable=(*caches, *outs)):
            return op(**options)

    return run


def reachable(value: Any) -> list[Tensor]:
    """The tensors of arguments: of stages, layouts and Ints too."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [x for part in value for x in reachable(part)]
    names = ("segments", "cu_seqlens", "cu_seqlens_in", "spans")
    return [getattr(value, name) for name in names if hasattr(value, name)]
