"""The KV-cache spec of a stage behind a boundary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from adsc_kernels.schedule import CompressionSchedule

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class AdscStageSpec(AttentionSpec):
    """Full attention over the survivors of a stage.

    No subclass of FullAttentionSpec: that one's `merge` takes subclasses in and would make one
    dense group of all layers, and the coordinator would trim its prefix hits by token count.
    """

    schedule: CompressionSchedule = field(hash=False)  # slow, and vLLM hashes in every step
    stage: int
    bucket: int = 0

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Of the longest request, which may have no image."""
        blocks = cdiv(vllm_config.model_config.max_model_len, self.block_size)
        return blocks * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Layers of several stages are not of one kind, though of one class."""
        return all(spec == self for spec in kv_cache_specs.values())
