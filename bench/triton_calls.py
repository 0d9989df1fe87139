"""What a call costs the host where Triton serves, up to the driver, on a machine without a GPU.

Kernels are compiled for real and launched by Triton's own launcher; the CUDA driver under it is a
library whose functions do nothing, built here, and the tensors are small and on the CPU. So the
time is that of Python and of Triton's C, without the driver's. Beside it the native op's on the
same tensors, moves included. The best of many short rounds, in µs of the thread's CPU time.

    python bench/triton_calls.py [--profile OP]
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS, ROUNDS = 2, 1000

_DRIVER = """
#include <string.h>
#define DO(name) int name() { return 0; }
int cuCtxGetCurrent(void **p) { *p = (void *)1; return 0; }
int cuModuleLoadData(void **p) { *p = (void *)1; return 0; }
int cuModuleGetFunction(void **p) { *p = (void *)1; return 0; }
int cuDeviceGetAttribute(int *p) { *p = 232448; return 0; }
int cuFuncGetAttribute(int *p, int what) { *p = what ? 0 : 1024; return 0; }
int cuDriverGetVersion(int *p) { *p = 13000; return 0; }
int cuStreamIsCapturing(void *s, int *p) { *p = 0; return 0; }
int cuGetErrorString(int e, const char **p) { *p = ""; return 0; }
DO(cuInit) DO(cuLaunchKernel) DO(cuLaunchKernelEx) DO(cuPointerGetAttribute) DO(cuFuncSetAttribute)
DO(cuCtxSetCurrent) DO(cuCtxGetDevice) DO(cuDevicePrimaryCtxRetain) DO(cuDeviceGet)
DO(cuFuncSetCacheConfig) DO(cuOccupancyMaxActiveClusters) DO(cuCtxSetLimit) DO(cuCtxGetLimit)
DO(cuModuleUnload) DO(cuTensorMapEncodeTiled) DO(cuTensorMapEncodeIm2col) DO(cuDeviceGetCount)
DO(cuDeviceGetName) DO(cuCtxSynchronize)
"""


def with_driver() -> None:
    """Starts this program again, where the loader finds that driver."""
    if "ADSC_NO_DRIVER" in os.environ:
        return
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "driver.c"), Path(folder, "libcuda.so.1")
        source.write_text(_DRIVER)
        command = ["cc", "-O2", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        paths = dict(TRITON_LIBCUDA_PATH=folder, LD_LIBRARY_PATH=folder, ADSC_NO_DRIVER="1")
        paths["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR", f"{folder}/cache")
        code = subprocess.run([sys.executable, *sys.argv], env=os.environ | paths).returncode
    sys.exit(code)


def serve_by_triton() -> None:
    """CPU tensors go Triton's way, as CUDA's do."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
    from triton.runtime import driver

    from adsc_kernels.ops import _dispatch
    from adsc_kernels.triton import launch

    def current_device() -> int:
        lazy_init()
        return 0

    def lazy_init() -> None:
        pass

    class Driver:
        get_current_device = staticmethod(current_device)
        get_current_stream = staticmethod(int)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        launcher_cls = CudaLauncher

    driver._active = Driver()
    Driver.utils = CudaUtils()  # type: ignore[attr-defined]

    def start(kernel: Any, programs: int, device: Any, arguments: Any, debug: bool, o: Any) -> None:
        if driver.active.get_current_device() == 0:
            launch._start_here(kernel, programs, 0, arguments, debug, o)

    launch._start = start
    sys.modules["adsc_kernels.backend"]._problems["triton", "cpu", 0] = ""
    library = _dispatch._libraries["adsc_triton"]
    for name, module in _MODULES.items():
        library.impl(name, _dispatch._imported(f"adsc_kernels.triton.{module}", name), "CPU")


_MODULES = {
    "downsample": "downsample",
    "downsample_many": "downsample",
    "downsample_add_rms_norm": "downsample_add_rms_norm",
    "rebuild_metadata": "rebuild_metadata",
    "boundary_step": "boundary_step",
    "compact_kv_": "compact",
    "compact_paged_kv_": "compact",
    "compress_step": "compress_step",
}


def microseconds(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.thread_time_ns()
        for _ in range(CALLS):
            run()
        best = min(best, time.thread_time_ns() - begin)
    return best / CALLS / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", help="of this op, where the time goes")
    wanted = parser.parse_args().profile
    with_driver()
    import torch
    import triton

    torch.set_num_threads(1)
    import adsc_kernels as adsc
    from adsc_kernels import ops

    sys.path.insert(0, str(Path(__file__).parent))
    import test_calls as cases

    layout = ops.BatchLayout(cases.BOUNDS, cases.SPANS, "1/4", num_tokens=12)
    runs = {
        **cases.OPS,
        "boundary_step, layout": lambda: ops.boundary_step(
            cases.HIDDEN, layout=layout, others=cases.OTHERS, **cases.NORM
        ),
    }
    serve_by_triton()
    if wanted is not None:
        with adsc.backend("triton"), cProfile.Profile() as profile:
            runs[wanted]()
            profile.clear()
            for _ in range(1000):
                runs[wanted]()
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
        return
    print(
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, Triton {triton.__version__}"
    )
    print("| op | native | Triton | ratio |\n| --- | --- | --- | --- |")
    for name, run in runs.items():
        run()
        native = microseconds(run)
        with adsc.backend("triton"):
            run()
            ours = microseconds(run)
        print(f"| {name} | {native:.1f} | {ours:.1f} | {ours / native:.2f} |", flush=True)


if __name__ == "__main__":
    main()
