"""How many requests fit, by vLLM's own grouping, coordinator and managers; no model runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.kv_cache_coordinator import get_kv_cache_coordinator
from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig

from adsc_kernels import CompressionSchedule
from adsc_kernels.integrations.vllm.groups import choose_grouping
from adsc_kernels.integrations.vllm.layout import Layouts
from adsc_kernels.integrations.vllm.manager import AdscStageManager, LayoutHashes
from adsc_kernels.integrations.vllm.plugin import register
from adsc_kernels.integrations.vllm.spec import AdscStageSpec

LAYERS, IMAGE, TEXT, BLOCK = 32, (35, 576, 24, 24), 101, 16
POOL = 20 << 30  # bytes: of LLaVA-1.5-7B's cache, 32 heads of 128 in two bytes


def concurrent(text: str) -> int:
    """Requests of one image and 101 text tokens that a pool of 20 GiB holds at once."""
    register()
    schedule = CompressionSchedule.parse(text, LAYERS)
    layouts = Layouts(schedule, lambda prompt, images: (IMAGE,))
    lengths = [IMAGE[1] + TEXT - n for n in layouts.of_spans((IMAGE,)).dropped]
    grouping = choose_grouping(schedule, lengths, BLOCK)
    page = dict(block_size=BLOCK, num_kv_heads=32, head_size=128, dtype=torch.float16)
    specs = {}
    for layer in range(LAYERS):
        stage = schedule.stage_of_layer(layer)
        bucket = int(layer - schedule.layers_of_stage(stage).start >= grouping.first[stage])
        specs[f"layers.{layer}"] = (
            AdscStageSpec(**page, schedule=schedule, stage=stage, bucket=bucket)
            if stage
            else FullAttentionSpec(**page)
        )
    groups = _get_kv_cache_groups_uniform_page_size(specs)
    size = max(len(group.layer_names) for group in groups)
    assert size == grouping.size or not schedule.boundaries
    blocks = POOL // (size * groups[0].kv_cache_spec.page_size_bytes)
    coordinator = get_kv_cache_coordinator(
        KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        max_model_len=4096,
        max_in_flight_tokens=8192,
        use_eagle=False,
        enable_caching=False,
        enable_kv_cache_events=False,
        dcp_world_size=1,
        pcp_world_size=1,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
    )
    requests: dict[str, SimpleNamespace] = {}
    for manager in coordinator.single_type_managers:
        if isinstance(manager, AdscStageManager):
            manager.requests = requests
    tokens, none = IMAGE[1] + TEXT, tuple(() for _ in groups)
    while True:
        name = str(len(requests))
        requests[name] = SimpleNamespace(block_hashes=LayoutHashes(layouts.of((), [IMAGE])))
        needed = coordinator.get_num_blocks_to_allocate(name, tokens, none, 0, 0, 0, tokens)
        if needed > coordinator.block_pool.get_num_free_blocks():
            return len(requests) - 1
        coordinator.allocate_new_computed_blocks(name, none, 0, 0)
        coordinator.allocate_new_blocks(name, tokens, tokens)


@pytest.mark.parametrize(
    ("schedule", "requests"),
    [
        ("", 59),
        ("8:1/4,16:1/4,24:1/4", 136),  # 2.31 times as many
        ("4:1/3,20:1/3", 134),
        ("16:1/4", 86),
        ("2:1/2", 97),
        ("1:1/9", 213),
    ],
)
def test_requests_in_20_gib(schedule, requests):
    assert concurrent(schedule) == requests
