"""Whether tensors of a cache share memory with one another, or with what a step reads."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

from torch import Tensor


class Reach(NamedTuple):
    """A tensor, from its first byte to behind its last."""

    begin: int
    end: int
    tensor: Tensor
    name: str


def check_overlap(tensors: Sequence[Tensor], names: Sequence[str]) -> list[Reach]:
    """Where the tensors lie that hold anything.

    Raises ValueError where two tensors, or two elements of one, share memory.
    """
    spans = []
    extents: dict[Any, int] = {}
    for x, name in zip(tensors, names, strict=True):
        form = (x.shape, x.stride())
        extent = extents.get(form, 0)
        if extent == 0:
            if x.numel() == 0:
                continue
            extent = extents[form] = _extent(x, name)
        begin = x.data_ptr()
        spans.append(Reach(begin, begin + extent * x.itemsize, x, name))
    spans.sort(key=lambda span: span[:2])
    # Extents in a chain of overlaps: views into one another's gaps, such as K and V of one storage.
    chain: list[Reach] = []
    end = 0
    for span in [*spans, None]:
        if span is not None and chain and span.begin < end:
            chain.append(span)
            end = max(end, span.end)
            continue
        for a, b in combinations(chain, 2):
            _check_pair(a, b)
        if span is not None:
            chain, end = [span], span.end
    return spans


def _check_pair(a: Reach, b: Reach) -> None:
    """b begins where a does, or later."""
    if a.end > b.begin and _share_memory(a.tensor, b.tensor, b.begin - a.begin):
        raise ValueError(f"{a.name}, {b.name}: expected tensors that don't share memory")


def check_apart(inputs: Sequence[tuple[str, Tensor]], caches: Sequence[Reach]) -> None:
    """Raises ValueError where one of the inputs, by name, shares memory with one of the caches."""
    for name, x in inputs:
        if caches and x.numel():  # none while a graph is traced
            steps = ((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            begin = x.data_ptr()
            reach = Reach(begin, begin + (1 + sum(steps)) * x.itemsize, x, name)
            for cache in caches:
                if reach.begin < cache.end and cache.begin < reach.end:
                    _check_pair(*sorted((reach, cache), key=lambda r: r.begin))


def _extent(x: Tensor, name: str) -> int:
    """Elements from the first to the last of x."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < extent:
                raise ValueError(
                    f"{name}: expected elements that don't share memory, got shape "
                    f"{tuple(x.shape)} with strides {tuple(x.stride())}"
                )
            extent += (size - 1) * stride
    return extent


def _share_memory(a: Tensor, b: Tensor, offset: int) -> bool:
    """Whether two views meet, where b begins `offset` >= 0 bytes behind a.

    Exact where both step through memory alike, as views of one cache do. Otherwise views count as
    apart only if they share their largest stride and keep to different parts of it.
    """
    sizes_a, sizes_b = _steps(a), _steps(b)
    steps = sorted(sizes_a.keys() | sizes_b.keys(), reverse=True)
    outer = steps[0]
    rest_a = sum((n - 1) * step for step, n in sizes_a.items() if step != outer)
    rest_b = sum((n - 1) * step for step, n in sizes_b.items() if step != outer)
    place = offset % outer
    if rest_a < place and place + rest_b < outer:
        return False
    reach = [(sizes_a.get(step, 1) - 1, sizes_b.get(step, 1) - 1) for step in steps]

    def meets(level: int, left: int) -> bool:
        # a's index less b's at this level, times its step: what is left must be made up below.
        if level == len(steps):
            return left == 0
        below = range(level + 1, len(steps))
        high = sum(reach[i][0] * steps[i] for i in below)
        low = -sum(reach[i][1] * steps[i] for i in below)
        least = max(-((high - left) // steps[level]), -reach[level][1])
        most = min((left - low) // steps[level], reach[level][0])
        return any(meets(level + 1, left - i * steps[level]) for i in range(least, most + 1))

    return meets(0, offset)


def _steps(x: Tensor) -> dict[int, int]:
    """How many times each distance in bytes is stepped; a row's bytes are steps of one."""
    width = x.itemsize
    sizes = {
        stride * width: size
        for stride, size in zip(x.stride(), x.shape, strict=True)
        if size > 1 and stride > 0
    }
    inner = sizes.pop(width, 1)
    return {**sizes, 1: inner * width}
