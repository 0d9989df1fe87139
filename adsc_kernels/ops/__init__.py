"""The ops of the token path. Each module holds one family: signature, checks, fake and autograd."""

from adsc_kernels.ops.downsample import downsample, downsample_many
from adsc_kernels.ops.metadata import Metadata, rebuild_metadata
from adsc_kernels.ops.norm import downsample_add_rms_norm

__all__ = [
    "Metadata",
    "downsample",
    "downsample_add_rms_norm",
    "downsample_many",
    "rebuild_metadata",
]
