"""The ops of the token path and of the cache.

Each module holds one family: signature, fake and autograd, and the checks that are its own.
"""

from adsc_kernels.kv.cache import DenseCache, PagedCache
from adsc_kernels.kv.pages import CompactionResult, Ints
from adsc_kernels.ops.boundary_step import BatchLayout, BoundaryStep, boundary_step
from adsc_kernels.ops.compact import compact_kv_, compact_paged_kv_
from adsc_kernels.ops.compress_step import CompressStep, compress_step
from adsc_kernels.ops.downsample import downsample, downsample_many
from adsc_kernels.ops.downsample_add_rms_norm import downsample_add_rms_norm
from adsc_kernels.ops.rebuild_metadata import Metadata, rebuild_metadata

__all__ = [
    "BatchLayout",
    "BoundaryStep",
    "CompactionResult",
    "CompressStep",
    "DenseCache",
    "Ints",
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
