"""The line that an engine writes at its start: stages, groups, padding, what it saves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adsc_kernels.integrations.vllm.layout import Layouts, Span

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

_TEXT = 100  # tokens beside the image in the request that the report counts


def startup_report(layouts: Layouts, kv_cache_config: KVCacheConfig, image: Span) -> str:
    """What the schedule makes of vLLM's KV cache, counted for one image and 100 text tokens."""
    schedule, groups = layouts.schedule, kv_cache_config.kv_cache_groups
    block = groups[0].kv_cache_spec.block_size
    layout = layouts.of_spans((image,))
    kept = [layout.end - dropped for dropped in layout.dropped]
    lengths = [n + _TEXT for n in kept]
    blocks = [-(-length // block) for length in lengths]
    size = max(len(group.layer_names) for group in groups)
    layers = [len(schedule.layers_of_stage(s)) for s in range(schedule.num_stages)]
    in_tokens = sum(n * length for n, length in zip(layers, lengths, strict=True))
    in_blocks = size * sum(blocks[getattr(group.kv_cache_spec, "stage", 0)] for group in groups)
    ideal = in_tokens / (schedule.num_layers * lengths[0])
    real = in_blocks / (schedule.num_layers * blocks[0])
    parts = [
        f"ADSC '{schedule}': {schedule.num_stages} stages of {layers} layers in {len(groups)} KV "
        f"groups of {size}, {size * len(groups) - schedule.num_layers} layers of padding",
        f"of an image of {image[1]} tokens the stages keep {kept}",
        f"KV of it and {_TEXT} text tokens: {ideal:.3f} of the dense model's in tokens, {real:.3f} "
        f"in blocks of {block}",
    ]
    return "; ".join(parts)
