"""The ops of the token path. Each module holds one family: signature, checks, fake and autograd."""

from adsc_kernels.ops.downsample import downsample, downsample_many

__all__ = ["downsample", "downsample_many"]
