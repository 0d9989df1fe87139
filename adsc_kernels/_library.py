"""The native operator library: found, loaded once, and asked what machine code it holds."""

import ctypes
import functools
from pathlib import Path

import torch

from adsc_kernels.errors import UnsupportedError

LIBRARY = Path(__file__).with_name("libadsc_ops.so")


@functools.cache
def load() -> ctypes.CDLL:
    """Registers `torch.ops.adsc_kernels.*` and returns the library.

    Raises ImportError where the library is missing or does not load on this torch.
    """
    if not LIBRARY.is_file():
        raise ImportError(
            f"adsc_kernels: the native library {LIBRARY} is missing; build it with "
            "`pip install --no-build-isolation -e .` in the source folder, or install a wheel"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
        return ctypes.CDLL(str(LIBRARY))  # the same handle: what is loaded is loaded once
    except OSError as error:
        raise ImportError(
            f"adsc_kernels: {LIBRARY} does not load on torch {torch.__version__} "
            f"(torch>=2.10 is needed): {error}"
        ) from error


def device_code(device: int = 0) -> int:
    """The architecture (90 for sm_90a) of the native code that CUDA device number `device` runs.

    Raises UnsupportedError, with the reason, where the library has no code for it.
    """
    try:
        query = load().adsc_device_code
    except AttributeError:
        from adsc_kernels._C import build_info

        raise UnsupportedError(f"no CUDA kernels: {build_info()['cuda_reason']}") from None
    query.restype = ctypes.c_char_p
    architecture = ctypes.c_int()
    reason = query(ctypes.c_int(device), ctypes.byref(architecture))
    if reason is not None:
        raise UnsupportedError(f"no native code for CUDA device {device}: {reason.decode()}")
    return architecture.value
