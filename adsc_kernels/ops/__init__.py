"""The ops of the token path and of the cache.

Each module holds one family: signature, checks, fake and autograd.
"""

from adsc_kernels.compaction import CompactionResult, Ints
from adsc_kernels.ops.boundary import BoundaryStep, Layout, boundary_step
from adsc_kernels.ops.compact import compact_kv_, compact_paged_kv_
from adsc_kernels.ops.compress_step import CompressStep, DenseCache, PagedCache, compress_step
from adsc_kernels.ops.downsample import downsample, downsample_many
from adsc_kernels.ops.metadata import Metadata, rebuild_metadata
from adsc_kernels.ops.norm import downsample_add_rms_norm

__all__ = [
    "BoundaryStep",
    "CompactionResult",
    "CompressStep",
    "DenseCache",
    "Ints",
    "Layout",
    "Metadata",
    "PagedCache",
    "boundary_step",
    "compact_kv_",
    "compact_paged_kv_",
    "compress_step",
    "downsample",
    "downsample_add_rms_norm",
    "downsample_many",
    "rebuild_metadata",
]
