"""The native module (csrc/module.cpp), or how to get it."""

try:
    from adsc_kernels import _C
except ImportError as error:
    raise ImportError(
        f"adsc_kernels: the native module _C is missing or does not load ({error}); build it with "
        "`pip install --no-build-isolation -e .` in the source folder, or install a wheel"
    ) from error

__all__ = ["_C"]
