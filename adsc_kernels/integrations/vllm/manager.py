"""The block manager of a stage: vLLM's token counts, translated to the stage's survivors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from adsc_kernels.integrations.vllm.layout import RequestLayout
from adsc_kernels.integrations.vllm.spec import AdscStageSpec

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
    from vllm.v1.request import Request


class LayoutHashes(list):
    """A request's block hashes, with its layout: all that a prefix-cache look-up is given."""

    def __init__(self, layout: RequestLayout, hashes: Sequence[BlockHash] = ()) -> None:
        super().__init__(hashes)
        self.layout = layout


class _StageHashes:
    """The block hashes of one stage, where `BlockPool.cache_full_blocks` looks for a request's."""

    def __init__(self, block_hashes: list[BlockHash | None]) -> None:
        self.block_hashes = block_hashes


class AdscStageManager(FullAttentionManager):
    """FullAttentionManager, counting the tokens that are in its stage.

    Prefix cache. Block i of a stage holds survivors i * block .. (i + 1) * block - 1. Its key is
    the hash of the prompt's block that holds the last of them: hashes cover all that comes before,
    and no two blocks of a stage end in the same block of the prompt. A hit of L tokens is possible
    where the stage has only whole blocks before L, so that nothing is written to a shared block.
    """

    supports_fine_grained_hash_lookup = False

    # The scheduler's own table: request id -> request.
    requests: Mapping[str, Request]

    def _kept(self, request_id: str, tokens: int) -> int:
        hashes = self.requests[request_id].block_hashes
        return hashes.layout.kept_before(self.kv_cache_spec.stage, tokens)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        return super().get_num_blocks_to_allocate(
            request_id,
            self._kept(request_id, num_tokens),
            new_computed_blocks,
            self._kept(request_id, total_computed_tokens),
            self._kept(request_id, num_local_computed_tokens),
            self._kept(request_id, num_tokens_main_model),
            apply_admission_cap=apply_admission_cap,
            prefill_end=prefill_end,
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        super().add_local_computed_blocks(
            request_id,
            new_computed_blocks,
            self._kept(request_id, num_local_computed_tokens),
            num_external_computed_tokens,  # 0: KV connectors are refused
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        return super().allocate_new_blocks(
            request_id,
            self._kept(request_id, num_tokens),
            self._kept(request_id, num_tokens_main_model),
        )

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        stage, block = self.kv_cache_spec.stage, self.block_size
        layout, hashes = request.block_hashes.layout, request.block_hashes
        cached = self.num_cached_block.get(request.request_id, 0)
        full = layout.kept_before(stage, num_tokens) // block
        if cached >= full:
            return
        # What is cached already is not read again.
        keys: list[Any] = [None] * cached
        for i in range(cached, full):
            keys.append(hashes[layout.position_of(stage, (i + 1) * block - 1) // block])
        self.block_pool.cache_full_blocks(
            request=_StageHashes(keys),
            blocks=self.req_to_blocks[request.request_id],
            num_cached_blocks=cached,
            num_full_blocks=full,
            block_size=block,
            kv_cache_group_id=self.kv_cache_group_id,
        )
        self.num_cached_block[request.request_id] = full

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: LayoutHashes,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: AdscStageSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        stage, block, layout = kv_cache_spec.stage, kv_cache_spec.block_size, block_hashes.layout
        found: tuple[list[KVCacheBlock], ...] = tuple([] for _ in kv_cache_group_ids)
        limit = min(max_length, len(block_hashes) * block)
        for i in range(layout.kept_before(stage, limit) // block):
            key = block_hashes[layout.position_of(stage, (i + 1) * block - 1) // block]
            blocks = block_pool.get_cached_block(key, kv_cache_group_ids)
            if not blocks:
                break
            for some, one in zip(found, blocks, strict=True):
                some.append(one)
        # The longest prefix that these blocks hold, and that ends with one of them.
        length = min(limit, layout.position_of(stage, len(found[0]) * block))
        length -= length % alignment_tokens
        while layout.kept_before(stage, length) % block:
            length -= alignment_tokens
        for some in found:
            del some[layout.kept_before(stage, length) // block :]
        return found, length


def register_stage_spec() -> None:
    """Adds the spec and its manager to vLLM's, which must be registered first: it registers its own
    only while there are none."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(AdscStageSpec, AdscStageManager, AdscStageSpec)
