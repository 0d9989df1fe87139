"""The report over the GPU code, and the GPU code itself: no spill, no lost 128-bit access."""

import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from cubin_report import (
    LIBRARY,
    Kernel,
    count,
    demangle,
    faults,
    find_cuobjdump,
    is_vector,
    main,
    parse,
    read_kernels,
    shorten,
)

from adsc_kernels import _C

USAGE = """
arch = sm_80
Resource usage:
 Common:
  GLOBAL:8 CONSTANT[4]:16
 Function _Z1aI5uint4Lb0EEvPT_:
  REG:64 STACK:976 SHARED:16 LOCAL:0 CONSTANT[0]:372 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_90a
 Function _Z1aI5uint4Lb0EEvPT_:
  REG:10 STACK:0 SHARED:1040 LOCAL:0 CONSTANT[0]:548 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
arch = sm_80
\t\tFunction : _Z1aI5uint4Lb0EEvPT_
        /*0070*/                   STL [R1+0x280], R59 ;   /* 0x0002803b01007387 */
        /*0080*/              @!P0 LDL.64 R2, [R1+0x8] ;   /* 0x0002803b01007387 */
        /*00b0*/               @P1 LDG.E R57, [R56.64] ;   /* 0x0000000438397981 */
        /*00c0*/                   STG.E [R56.64], R57 ;   /* 0x0000000438397981 */
        /*00d0*/                   LDG.E.128.CONSTANT R4, [R2.64] ;  /* 0x0000000438397981 */
arch = sm_90a
\t\tFunction : _Z1aI5uint4Lb0EEvPT_
        /*1070*/              @UP0 LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0000000438397981 */
        /*10b0*/                   STG.E.EF.128 desc[UR4][R2.64], R4 ;
"""


def test_parser_on_a_planted_spill() -> None:
    name = "_Z1aI5uint4Lb0EEvPT_"
    bad, good = parse(USAGE, SASS)
    assert bad == Kernel(name, "sm_80", 64, 976, 16, 2, 1, 2, 0, 1)
    assert good == Kernel(name, "sm_90a", 10, 0, 1040, 0, 1, 1, 1, 1)
    readable = demangle([name])[name]
    assert readable == "a<uint4, false>"
    assert faults(bad, readable) == ["976 bytes of stack", "2 spills", "no 128-bit store"]
    assert faults(good, readable) == []


def test_names_and_instructions() -> None:
    assert shorten("void adsc::(anonymous namespace)::k<f(int), 3>(int, char)") == "k<f(int), 3>"
    assert is_vector("downsample_kernel") and is_vector("norm<Half, uint4>")
    assert not is_vector("norm<Half, unsigned short>") and not is_vector("move<uint2>")
    kernel = Kernel("k", "sm_100")
    for instruction in (
        "LDGSTS.E.BYPASS.128",
        "UBLKCP.S.G",
        "STG.E.ENL2.256",
        "LDS.128",
        "STS.128",
    ):
        count(kernel, instruction)
    assert (kernel.wide_loads, kernel.loads, kernel.wide_stores, kernel.stores) == (2, 2, 2, 2)


PLANTED = """
template <class V> __global__ void spill(const float* in, float* out, int n) {
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = in[i * n];
  for (int i = 0; i < 64; ++i) out[i * n] = a[63 - i];  // may overlap what is still to be read
}
template <class V> __global__ void copy(const V* in, V* out) { out[threadIdx.x] = in[threadIdx.x]; }
template __global__ void spill<int4>(const float*, float*, int);
template __global__ void copy<int4>(const int4*, int4*);
"""


@pytest.mark.skipif(not shutil.which("nvcc") or not find_cuobjdump(), reason="no nvcc or cuobjdump")
def test_report_fails_on_planted_kernels(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, cubin = tmp_path / "planted.cu", tmp_path / "planted.cubin"
    source.write_text(PLANTED)
    command = ["nvcc", "-cubin", "-arch=sm_80", "-maxrregcount=24", "-o", cubin, source]
    subprocess.run(command, check=True)
    assert main([cubin]) == 1
    lines = {
        line.split("sm_80")[1].split()[0]: line
        for line in capsys.readouterr().out.splitlines()
        if "sm_80" in line
    }
    assert lines["copy<int4>"].endswith("copy<int4>")
    assert "bytes of stack" in lines["spill<int4>"]
    assert "no 128-bit load, no 128-bit store" in lines["spill<int4>"]


@pytest.mark.skipif(_C.build_info()["cuda_archs"] is None, reason="built without CUDA")
def test_the_library() -> None:
    cuobjdump = find_cuobjdump()
    assert cuobjdump, "the CUDA kernels were built, but no cuobjdump was found: install triton"
    kernels = read_kernels(LIBRARY, cuobjdump)
    names = demangle(kernel.name for kernel in kernels)
    by_arch = defaultdict(list)
    for kernel in kernels:
        by_arch[kernel.arch].append(names[kernel.name])
    for found in by_arch.values():
        assert "downsample_kernel" in found
        assert "downsample_add_rms_norm_kernel<BFloat16, uint4>" in found
    assert set(by_arch) == {a for a in _C.build_info()["cuda_archs"] if a.startswith("sm_")}
    wrong = {(names[k.name], k.arch): faults(k, names[k.name]) for k in kernels}
    assert {key: fault for key, fault in wrong.items() if fault} == {}
