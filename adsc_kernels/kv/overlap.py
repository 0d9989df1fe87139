"""Whether tensors of a cache share memory with one another, or with what a step reads.

csrc/overlap.h tells; the native ops ask it themselves, in front of their first write.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adsc_kernels._planner import _C

if TYPE_CHECKING:
    from adsc_kernels.kv.tensors import Caches


def check_overlap(tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raises ValueError where two tensors, or two elements of one, share memory."""
    found, _ = _C.find_overlap(list(map(_place, tensors)))
    if found is None:
        return
    first, second = found
    if first == second:
        x = tensors[first]
        raise ValueError(
            f"{names[first]}: expected elements that don't share memory, got shape "
            f"{tuple(x.shape)} with strides {tuple(x.stride())}"
        )
    raise ValueError(f"{names[first]}, {names[second]}: expected tensors that don't share memory")


def places_apart(groups: Iterable[Sequence[Tensor]]) -> list[int] | None:
    """The addresses of tensors which differ within a group in their places alone, if they begin
    further apart than the longest of them is long. Quick; where they don't, `check_overlap` tells
    the rest."""
    addresses: list[int] = []
    starts: list[int] = []  # of those with elements
    longest = 0
    for group in groups:
        own = list(map(Tensor.data_ptr, group))
        addresses += own
        if not group or group[0].numel() == 0:
            continue
        first = group[0]
        if _C.find_overlap([_place(first)])[0] is not None:
            return None
        last = sum((n - 1) * stride for n, stride in zip(first.shape, first.stride(), strict=True))
        longest = max(longest, (last + 1) * first.itemsize)
        starts += own
    starts.sort()
    apart = min(map(operator.sub, starts[1:], starts), default=longest) >= longest
    return addresses if apart else None


def check_apart(inputs: Sequence[tuple[str, Tensor]], caches: Caches) -> None:
    """Raises ValueError where one of the inputs, by name, shares memory with one of the caches."""
    written = None if caches.places is None else caches.places.prepared.get("overlap")
    if written is None:
        written = list(map(_place, caches.tensors))
        if caches.places is not None:
            caches.places.prepared["overlap"] = written
    found = _C.find_shared([_place(x) for _, x in inputs], written)
    if found is None:
        return
    (name, x), cache = inputs[found[0]], found[1]
    both = sorted([(x.data_ptr(), name), (written[cache][0], caches.names[cache])])
    raise ValueError(f"{both[0][1]}, {both[1][1]}: expected tensors that don't share memory")


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.itemsize, x.shape, x.stride()
