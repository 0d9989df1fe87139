"""Compiles what a launcher would launch, for a GPU that need not be here, and reads the result.

The launchers themselves run, on CPU tensors, with Triton's driver replaced by one that has a target
and no device: so what is compiled is what they pick, not a list kept beside them.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Kernel:
    """A compiled kernel: its PTX, its machine code in words, and what it takes of a processor."""

    name: str
    arch: int
    ptx: str = field(repr=False)
    sass: str = field(repr=False)
    registers: int
    stack: int
    spills: int  # instructions that touch local memory
    shared: int

    def widths(self, access: str) -> set[int]:
        """Bits of the global accesses, access being "ld" or "st"."""
        found = set()
        for line in re.findall(rf"\b{access}\.global[\w.:]*", self.ptx):
            vector, bits = re.search(r"\.v([248])", line), re.search(r"\.[bus](\d+)", line)
            assert bits is not None, line
            found.add(int(bits[1]) * (int(vector[1]) if vector else 1))
        return found


def tool(name: str) -> str:
    beside = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} comes with Triton and with the CUDA toolkit"
    return found


def read(compiled: Any, arch: int) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool("cuobjdump"), "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Kernel(
        name=compiled.metadata.name,
        arch=arch,
        ptx=compiled.asm["ptx"],
        sass=text,
        registers=used["REG"],
        stack=used["STACK"] + used["LOCAL"],
        spills=len(re.findall(r"\b(?:LDL|STL)\b", text)),
        shared=compiled.metadata.shared,
    )


@contextlib.contextmanager
def ahead_of_time(arch: int) -> Iterator[list[Kernel]]:
    """Within, launches compile for sm_<arch> in place of running; the list fills with them."""
    kernels: list[Kernel] = []
    run = JITFunction.run

    def compile_only(
        self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any
    ) -> None:
        kernels.append(read(run(self, *arguments, grid=grid, warmup=True, **options), arch))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Driver(arch))
        patch.setattr(JITFunction, "run", compile_only)
        yield kernels
