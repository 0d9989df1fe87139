"""How many requests fit: by vLLM's own grouping, coordinator and managers, where no model runs; and
in a running engine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engines import engine, scheduler_of
from PIL import Image
from vllm import SamplingParams
from vllm.v1.core.kv_cache_coordinator import get_kv_cache_coordinator
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig

import adsc_kernels
from adsc_kernels import CompressionSchedule
from adsc_kernels.integrations.vllm.groups import choose_grouping
from adsc_kernels.integrations.vllm.layout import Layouts
from adsc_kernels.integrations.vllm.manager import AdscStageManager, LayoutHashes
from adsc_kernels.integrations.vllm.plugin import register
from adsc_kernels.integrations.vllm.spec import AdscStageSpec

try:
    from vllm.v1.core.kv_cache_planning import _get_kv_cache_groups_uniform_page_size
except ImportError:  # before vLLM 0.33
    from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size

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
        ("5:1/3,17:1/3", 123),
        ("16:1/4", 86),
        ("2:1/2", 97),
        ("1:1/9", 213),
    ],
)
def test_requests_in_20_gib(schedule, requests):
    assert concurrent(schedule) == requests


DIGITS = Path(adsc_kernels.__file__).parent / "checkpoints" / "tiny-llava-digits"


def most_running(schedule: str, blocks: int) -> tuple[int, int]:
    """The most requests, of 26 about pictures of 576 tokens with answers of 32, that the engine
    decodes in one step; and the bytes of its KV cache."""
    folder = DIGITS / "pictures"
    asked = json.loads((folder / "questions.json").read_text())
    requests = [
        {
            "prompt": f"USER: <image>\n{question['question']} ASSISTANT:",
            "multi_modal_data": {"image": Image.open(folder / name)},
        }
        for name, questions in asked.items()
        for question in questions
    ]
    options = dict(max_model_len=704, max_num_seqs=26, num_gpu_blocks_override=blocks)
    with engine(SimpleNamespace(folder=DIGITS), schedule, **options) as llm:
        scheduler, running = scheduler_of(llm), []
        step = scheduler.schedule

        def watched(*args, **kwargs):
            output = step(*args, **kwargs)
            done = (r.num_computed_tokens >= r.num_prompt_tokens for r in scheduler.running)
            running.append(sum(done))
            return output

        scheduler.schedule = watched
        greedy = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
        llm.generate((requests * 26)[:26], greedy, use_tqdm=False)
        # One allocation, in which the groups' tensors lie over one another.
        [size] = {tensor.size for tensor in scheduler.kv_cache_config.kv_cache_tensors}
        return max(running), size


def test_running_at_once():
    """At equal bytes of KV cache, with the bundled model (16 layers, two KV heads of 32)."""
    dense, dense_bytes = most_running("", 161)  # of 16 layers
    compressed, compressed_bytes = most_running("4:1/4,8:1/4,12:1/4", 4 * 161)  # of 4
    assert compressed_bytes == dense_bytes
    assert (dense, compressed) == (8, 23)
