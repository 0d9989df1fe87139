"""The block manager of a stage: vLLM's token counts, translated to the stage's survivors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from adsc_kernels.integrations.vllm.layout import RequestLayout
from adsc_kernels.integrations.vllm.spec import AdscStageSpec

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request


class LayoutHashes(list):
    """A request's block hashes, with its layout: all that a prefix-cache look-up is given."""

    def __init__(self, layout: RequestLayout, hashes: Sequence[BlockHash] = ()) -> None:
        super().__init__(hashes)
        self.layout = layout


class _OneHash:
    """A key, where `BlockPool.cache_partial_block` looks for that of a request's first block."""

    def __init__(self, block_hash: BlockHash) -> None:
        self.block_hashes = [block_hash]


class AdscStageManager(FullAttentionManager):
    """FullAttentionManager, counting the tokens that are in its stage.

    Prefix cache. Block i of a stage holds survivors i * block .. (i + 1) * block - 1. Its key is
    the hash of the prompt's block that holds the last of them: hashes cover all that comes before,
    and no two blocks of a stage end in the same block of the prompt.

    A hit of L tokens ends in a stage's block where the survivors before L don't fill their last
    one, the tail. It is known by a key of its own for each L, and vLLM copies it for the request
    that hits it (what it does for Mamba's states), so that nothing is written to a shared block.
    """

    supports_fine_grained_hash_lookup = False

    # The scheduler's own table: request id -> request.
    requests: Mapping[str, Request]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stage = self.kv_cache_spec.stage
        self._keyed: dict[str, int] = {}  # blocks of a request's prompt whose keys are made
        self._unpublished: dict[str, list[tuple[BlockHash, KVCacheBlock]]] = {}

    def _kept(self, request_id: str, tokens: int) -> int:
        return self.requests[request_id].block_hashes.layout.kept_before(self._stage, tokens)

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
        kept = self._kept(request_id, num_tokens)
        if not new_computed_blocks:  # asked of every group for each request in each step
            return max(-(-kept // self.block_size) - len(self.req_to_blocks.get(request_id, ())), 0)
        return super().get_num_blocks_to_allocate(
            request_id,
            kept,
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
        # The copy of a tail gets the key under which it was found, too.
        self._keyed[request_id] = max(num_local_computed_tokens // self.block_size - 1, 0)
        super().add_local_computed_blocks(
            request_id,
            new_computed_blocks,
            self._kept(request_id, num_local_computed_tokens),
            num_external_computed_tokens,  # 0: KV connectors are refused
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        kept = self._kept(request_id, num_tokens)
        return super().allocate_new_blocks(request_id, kept, kept)  # the latter is for draft models

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        name, block = request.request_id, self.block_size
        first, end = self._keyed.get(name, 0), num_tokens // block
        if end <= first:
            return
        hashes, blocks = request.block_hashes, self.req_to_blocks[name]
        kept = self._kept(name, first * block)
        for i in range(first, end):
            before, kept = kept, self._kept(name, (i + 1) * block)
            if kept // block > before // block:
                self._insert(hashes[i], blocks[kept // block - 1])
            if kept % block:
                self._unpublished.setdefault(name, []).append((hashes[i], blocks[kept // block]))
        self._keyed[name] = end
        self.num_cached_block[name] = kept // block

    def publish(self) -> None:
        """At the end of a scheduler's step: from the next one on, tails that this one fills may be
        copied. Copies run before a step's layers do."""
        for tails in self._unpublished.values():
            for block_hash, block in tails:
                self._insert(tail_hash(block_hash), block)
        self._unpublished.clear()

    def _insert(self, block_hash: BlockHash, block: KVCacheBlock) -> None:
        """Make a block known under one more key; it keeps those that it has until it is reused."""
        size = self.block_pool.hash_block_size
        self.block_pool.cache_partial_block(
            _OneHash(block_hash), block, size, self.kv_cache_group_id, self.block_size
        )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._keyed.pop(request_id, None)
        self._unpublished.pop(request_id, None)  # preempted in the step that would have filled them
        return super().pop_blocks_for_free(request_id)

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
        full: list[list[KVCacheBlock]] = []  # of each group, by block
        length = min(max_length, len(block_hashes) * block)
        length -= length % alignment_tokens
        for i in range(layout.kept_before(stage, length) // block):
            key = block_hashes[layout.position_of(stage, (i + 1) * block - 1) // block]
            blocks = block_pool.get_cached_block(key, kv_cache_group_ids)
            if not blocks:
                break
            full.append(blocks)
        for end in range(length, 0, -alignment_tokens):
            whole, rest = divmod(layout.kept_before(stage, end), block)
            if whole > len(full):
                continue
            tail: list[list[KVCacheBlock]] = []
            if rest:
                key = tail_hash(block_hashes[end // block - 1])
                blocks = block_pool.get_cached_block(key, kv_cache_group_ids)
                if not blocks:
                    continue
                tail = [blocks]
            found = full[:whole] + tail
            return tuple([some[g] for some in found] for g in range(len(kv_cache_group_ids))), end
        return tuple([] for _ in kv_cache_group_ids), 0


def tail_hash(block_hash: BlockHash) -> BlockHash:
    """The key of a stage's last, partial block where the prompt's block with this hash ends."""
    return BlockHash(block_hash + b"tail")


def register_stage_spec() -> None:
    """Adds the spec and its manager to vLLM's, which must be registered first: it registers its own
    only while there are none."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(AdscStageSpec, AdscStageManager, AdscStageSpec)
