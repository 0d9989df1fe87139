"""The kernels in Triton: one file for each op, by the name it has in `adsc_kernels.ops`.

They serve devices for which the native library has no code, and read as the short form of what is
in csrc/cuda. Nothing here is imported before the first tensor that Triton is to serve.
"""
