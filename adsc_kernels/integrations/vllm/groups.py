"""How a schedule's layers fall into vLLM's KV-cache groups, and what that costs. No vLLM here.

vLLM allots block ids to groups; one id costs as much as the largest group's layers, so groups of
unequal size waste the difference. It forms groups from "buckets" of equal specs: each bucket is cut
into groups of one common size. A stage that reports its layers as two buckets steers that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adsc_kernels.schedule import CompressionSchedule

# What a group costs the host, in shares of the dense model's bytes: the metadata of 32 groups took
# 8 ms of a step in which an H200 decodes a 7B model in less.
_PRICE = 0.004


@dataclass(frozen=True)
class Grouping:
    """A way to cut the stages into buckets.

    Attributes:
        first: for each stage, how many of its layers report bucket 0; the others report bucket 1.
        size: layers of a group, padding included.
        groups: the number of groups of each stage.
    """

    first: tuple[int, ...]
    size: int
    groups: tuple[int, ...]

    def padding(self, schedule: CompressionSchedule) -> int:
        """Layers' worth of cache that holds nothing."""
        return self.size * sum(self.groups) - schedule.num_layers

    def fraction(self, schedule: CompressionSchedule, lengths: Sequence[int], block: int) -> float:
        """KV blocks of a sequence with these lengths in the stages, against the dense model's."""
        blocks = [-(-length // block) for length in lengths]
        used = sum(n * b for n, b in zip(self.groups, blocks, strict=True)) * self.size
        return used / (schedule.num_layers * blocks[0])


def group_size(buckets: Sequence[int]) -> int:
    """vLLM's rule (`_get_kv_cache_groups_uniform_page_size`) for the layers of a group."""
    smallest, largest = min(buckets), max(buckets)
    return largest if largest < smallest * 1.5 else smallest


def choose_grouping(schedule: CompressionSchedule, lengths: Sequence[int], block: int) -> Grouping:
    """The grouping that takes the fewest bytes for a sequence with these lengths in the stages,
    where each group counts too: metadata in every step, and a block table for each request."""
    layers = [len(schedule.layers_of_stage(s)) for s in range(schedule.num_stages)]
    best: Grouping | None = None
    cost = 0.0
    # Stage 0 keeps vLLM's own spec, which knows no buckets.
    cuts = [(s, n) for s in range(1, schedule.num_stages) for n in range(1, layers[s])]
    for stage, part in [(0, layers[0]), *cuts]:
        first = tuple(part if s == stage else n for s, n in enumerate(layers))
        buckets = [[part, n - part] if s == stage else [n] for s, n in enumerate(layers)]
        size = group_size([n for some in buckets for n in some if n])
        groups = tuple(sum(-(-n // size) for n in some) for some in buckets)
        grouping = Grouping(first, size, groups)
        new_cost = grouping.fraction(schedule, lengths, block) + _PRICE * sum(groups)
        if best is None or new_cost < cost:
            best, cost = grouping, new_cost
    assert best is not None
    return best
