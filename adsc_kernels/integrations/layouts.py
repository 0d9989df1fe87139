"""Engines' caches and tables as the compaction ops take them: the public name of what is in kv/."""

from adsc_kernels.kv.cache import DenseCache, PagedCache
from adsc_kernels.kv.engines import (
    crop_transformers,
    from_flashinfer,
    from_sglang,
    from_tensorrt_llm,
    from_transformers,
    from_vllm,
)
from adsc_kernels.kv.tables import (
    block_table_to_csr,
    block_table_to_req_to_token_,
    csr_to_block_table,
    req_to_token_to_block_table,
    req_to_token_to_csr,
    trtllm_offsets_to_block_table,
)

__all__ = [
    "DenseCache",
    "PagedCache",
    "block_table_to_csr",
    "block_table_to_req_to_token_",
    "crop_transformers",
    "csr_to_block_table",
    "from_flashinfer",
    "from_sglang",
    "from_tensorrt_llm",
    "from_transformers",
    "from_vllm",
    "req_to_token_to_block_table",
    "req_to_token_to_csr",
    "trtllm_offsets_to_block_table",
]
