"""What the compiler made of the GPU kernels, read from their machine code; no GPU is needed.

    python python_tests/cubin_report.py [library, object or cubin ...]

For each kernel and architecture: registers, stack, spills (loads and stores of local memory),
static shared memory, and how many accesses to global memory are of 128 bits or more, among all.
Exits with 1 where a kernel uses a stack or spills, or where one that moves 16 bytes at a time does
not.

The disassembler is CUDA's cuobjdump, or the one that Triton brings.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

LIBRARY = Path(__file__).resolve().parent.parent / "adsc_kernels/libadsc_ops.so"


@dataclass
class Kernel:
    """One kernel's code for one architecture. Sizes in bytes; loads and stores are instructions."""

    name: str  # as the linker has it
    arch: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    local: int = 0  # spills, and arrays that have no registers
    wide_loads: int = 0
    loads: int = 0
    wide_stores: int = 0
    stores: int = 0


def find_cuobjdump() -> str | None:
    """CUDA's cuobjdump, or Triton's; None where there is neither."""
    nvcc = shutil.which("nvcc")
    places = [Path(nvcc).resolve().parent] if nvcc else []
    triton = importlib.util.find_spec("triton")
    if triton and triton.submodule_search_locations:
        places.append(Path(triton.submodule_search_locations[0]) / "backends/nvidia/bin")
    found = (shutil.which("cuobjdump", path=str(place)) for place in places)
    return shutil.which("cuobjdump") or next(filter(None, found), None)


def read_kernels(path: Path, cuobjdump: str) -> list[Kernel]:
    """The kernels in a library, an object file or a cubin."""

    def dump(option: str) -> str:
        result = subprocess.run([cuobjdump, option, str(path)], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{cuobjdump} {option} {path}: {result.stderr}")
        return result.stdout

    return parse(dump("-res-usage"), dump("-sass"))


def parse(usage: str, sass: str) -> list[Kernel]:
    """From the text of `cuobjdump -res-usage` and `cuobjdump -sass`."""
    kernels: dict[tuple[str, str], Kernel] = {}
    arch = name = ""
    for line in usage.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (.+):$", line):
            name = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            kernels[name, arch] = Kernel(name, arch, registers, max(stack, local), shared)
    kernel = None
    for line in sass.splitlines():
        if match := re.match(r"\s*(?:arch = |code for )(\w+)$", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (.+)$", line):
            kernel = kernels.get((match[1], arch)) or kernels.get((match[1], ""))
            if kernel:
                kernel.arch = arch  # a bare cubin says it only here
        elif kernel and (match := INSTRUCTION.match(line)):
            count(kernel, match[1])
    return list(kernels.values())


INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
# Asynchronous copies to and from shared memory; the bulk ones have no width of their own.
ASYNC_LOADS, BULK_COPIES = ("LDGSTS",), ("UBLKCP", "UTMALDG", "UTMASTG")


def count(kernel: Kernel, instruction: str) -> None:
    """Adds one machine instruction, such as LDG.E.128, to what is known of the kernel."""
    operation, *modifiers = instruction.split(".")
    wide = "128" in modifiers or "256" in modifiers
    if operation in ("LDL", "STL"):
        kernel.local += 1
    if operation in ("LDG", "LD", *ASYNC_LOADS, *BULK_COPIES):
        kernel.loads += 1
        kernel.wide_loads += wide or operation in BULK_COPIES
    if operation in ("STG", "ST", *BULK_COPIES):
        kernel.stores += 1
        kernel.wide_stores += wide or operation in BULK_COPIES


def demangle(names: Iterable[str]) -> dict[str, str]:
    """The names in C++, without namespaces and parameters: copy_rows<uint4, false>."""
    names = list(names)
    result = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return dict(zip(names, map(shorten, result.stdout.splitlines()), strict=True))


def shorten(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|\b(?:adsc|cuda|_GLOBAL__N__\w+)::", "", name)
    name = re.sub(r"^void ", "", name)
    depth = 0  # the parameters begin at the first ( outside of template arguments
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


# Kernels that don't move rows, and the narrow twins, by their access type, of those that do. Every
# other kernel must have 128-bit accesses.
NARROW = re.compile(
    r"probe|(?:check|clear|read_only)_\w+|rebuild_metadata\w*|"
    r"\w+<(?:.*, )?(?:uint2|unsigned (?:char|short|int|long))>"
)


def is_vector(name: str) -> bool:
    """Whether a kernel moves 16 bytes at a time where alignment allows."""
    return NARROW.fullmatch(name) is None


def is_checked(name: str) -> bool:
    """Whether a kernel is one of ADSC_CHECK=1, whose message needs a stack."""
    return name.startswith("check_")


def faults(
    kernel: Kernel,
    name: str,
    vector: Callable[[str], bool] = is_vector,
    checked: Callable[[str], bool] = is_checked,
) -> list[str]:
    """What is wrong with a kernel, by its name in C++."""
    found = []
    if not checked(name):
        if kernel.stack:
            found.append(f"{kernel.stack} bytes of stack")
        if kernel.local:
            found.append(f"{kernel.local} spills")
    if vector(name):
        if not kernel.wide_loads:
            found.append("no 128-bit load")
        if not kernel.wide_stores:
            found.append("no 128-bit store")
    return found


def main(paths: list[Path]) -> int:
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        print("no cuobjdump: neither CUDA's nor Triton's")
        return 2
    kernels = [kernel for path in paths for kernel in read_kernels(path, cuobjdump)]
    names = demangle(kernel.name for kernel in kernels)
    print(" regs stack spills shared  wide/loads wide/stores  arch     kernel")
    bad = 0
    for kernel in sorted(kernels, key=lambda kernel: (names[kernel.name], kernel.arch)):
        found = faults(kernel, names[kernel.name])
        bad += bool(found)
        print(
            f"{kernel.registers:5d} {kernel.stack:5d} {kernel.local:6d} {kernel.shared:6d} "
            f"{kernel.wide_loads:5d}/{kernel.loads:<5d} {kernel.wide_stores:5d}/{kernel.stores:<5d}"
            f"  {kernel.arch:8s} {names[kernel.name]}{'  <- ' if found else ''}{', '.join(found)}"
        )
    print(f"{len(kernels)} kernels, {bad} with faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main([Path(argument) for argument in sys.argv[1:]] or [LIBRARY]))
