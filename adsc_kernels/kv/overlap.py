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


class _Part(NamedTuple):
    """What of a tensor's addresses is still to be told from others'."""

    begin: int  # bytes, from the same place for all parts
    form: "_Form"
    reach: Reach


# Distances that are stepped, largest first, each with the bytes from the first to behind the last
# that lie within it; at the end the bytes of a row, stepped by one.
_Form = tuple[tuple[int, int], ...]


def check_overlap(tensors: Sequence[Tensor], names: Sequence[str]) -> list[Reach]:
    """Where the tensors lie that hold anything.

    Raises ValueError where two tensors, or two elements of one, share memory.
    """
    parts = []
    forms: dict[Any, _Form] = {}
    for x, name in zip(tensors, names, strict=True):
        key = (x.shape, x.stride(), x.itemsize)
        form = forms.get(key)
        if form is None:
            if x.numel() == 0:
                continue
            form = forms[key] = _form(x, name)
        begin = x.data_ptr()
        parts.append(_Part(begin, form, Reach(begin, begin + form[0][1], x, name)))
    _check_parts(parts)
    return [part.reach for part in parts]


def _check_parts(parts: list[_Part]) -> None:
    """Splits parts where no extent reaches across; what still hangs together is looked into."""
    chain: list[_Part] = []
    end = 0
    for part in sorted(parts, key=lambda part: part.begin):
        if part.begin >= end:
            _check_chain(chain)
            chain = []
        chain.append(part)
        end = max(end, part.begin + part.form[0][1])
    _check_chain(chain)


def _check_chain(chain: list[_Part]) -> None:
    """Tells parts by their places within the largest distance that any of them steps, such as K and
    V of all layers within a page: those that lie apart there are apart. It takes a sort for each
    such distance; only where a part lies across two places are all pairs compared.
    """
    if len(chain) < 2:
        return
    outer = max(part.form[0][0] for part in chain)
    origin = chain[0].begin
    inner = []
    for begin, form, reach in chain:
        below = form[1:] if form[0][0] == outer > 1 else form  # a run of bytes stays one
        place = (begin - origin) % outer
        if outer == 1 or place + below[0][1] > outer:
            break
        inner.append(_Part(place, below, reach))
    else:
        return _check_parts(inner)
    for a, b in combinations(sorted((part.reach for part in chain), key=lambda r: r.begin), 2):
        _check_pair(a, b)


def _form(x: Tensor, name: str) -> _Form:
    _check_own(x, name)
    extent, form = 0, []
    for step, size in sorted(_steps(x).items()):
        extent = size if step == 1 else extent + (size - 1) * step
        form.append((step, extent))
    return tuple(reversed(form))


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


def _check_own(x: Tensor, name: str) -> None:
    """Raises ValueError where two elements of x share memory."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < extent:
                raise ValueError(
                    f"{name}: expected elements that don't share memory, got shape "
                    f"{tuple(x.shape)} with strides {tuple(x.stride())}"
                )
            extent += (size - 1) * stride


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
