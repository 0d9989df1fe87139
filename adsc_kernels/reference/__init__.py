"""The oracle: every op as a plain loop, on any device, written to be read.

The functions are those of `adsc_kernels.ops` by name, and take and return what the schemas of
`torch.ops.adsc_kernels` do: what moves is segments, keep_indices and num_tokens; a cache is a list
of K of every layer, then V, then the scales of either. Slow, and free to look at what tensors hold,
which the kernels may not.
"""

from adsc_kernels.reference.caches import compact_kv_, compact_paged_kv_, compress_step
from adsc_kernels.reference.rows import (
    boundary_step,
    downsample,
    downsample_add_rms_norm,
    downsample_many,
    rebuild_metadata,
    upsample_grad,
)
from adsc_kernels.reference.rule import (
    PATTERNS,
    aligned_kept_count,
    kept_before,
    kept_count,
    kept_index,
    source_rows,
)

__all__ = [
    "PATTERNS",
    "aligned_kept_count",
    "boundary_step",
    "compact_kv_",
    "compact_paged_kv_",
    "compress_step",
    "downsample",
    "downsample_add_rms_norm",
    "downsample_many",
    "kept_before",
    "kept_count",
    "kept_index",
    "rebuild_metadata",
    "source_rows",
    "upsample_grad",
]
