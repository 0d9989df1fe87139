"""What the native library keeps of a cache from one call to the next: `KeptCaches`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from adsc_kernels.kv.cache import DenseCache, PagedCache
    from adsc_kernels.kv.tensors import Caches


class KeptCaches:
    """A cache's tensors as the native library has checked them and holds them, by a number.

    A call of a native op hands over the number in place of its tensors, 64 of 32 layers. The
    library looks at every one of them in every call, and refuses those that aren't what they were:
    place, shape, strides, dtype, device; for other kernels it does so where it is asked
    (`unchanged`). What it can't know, whether the object names the same tensors, is asked here.
    They live as long as this.
    """

    __slots__ = ("any_inference", "caches", "fields", "listed", "lists", "number")

    def __init__(self, cache: DenseCache | PagedCache, caches: Caches) -> None:
        self.number: int = _ops().keep(caches.tensors, caches.num_layers, cache.layout)
        self.listed = caches  # as other kernels take them
        self.caches = caches._replace(number=self.number)
        self.any_inference = any(map(torch.Tensor.is_inference, caches.tensors))
        self.fields = (cache.k_caches, cache.v_caches, cache.k_scales, cache.v_scales, cache.layout)
        # What may be changed from outside, beside what it held.
        self.lists = [(x, (*x,)) for x in self.fields if not isinstance(x, _FIXED)]

    def holds(self, cache: DenseCache | PagedCache) -> bool:
        """Whether the tensors, in this layout, are those of the object."""
        k, v, k_scales, v_scales, layout = self.fields
        if (
            cache.k_caches is not k
            or cache.v_caches is not v
            or cache.k_scales is not k_scales
            or cache.v_scales is not v_scales
            or cache.layout != layout
        ):
            return False
        for now, was in self.lists:
            if len(now) != len(was) or not all(map(operator.is_, now, was)):
                return False
        return True

    def unchanged(self) -> bool:
        """Whether each of the tensors is what it was."""
        try:
            _ops().check(self.number)
        except (ValueError, RuntimeError):  # the latter in torch 2.15
            return False
        return True

    def __del__(self) -> None:
        if hasattr(self, "number"):  # nothing was refused
            _ops().release(self.number)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of the object, and one in another process, keeps nothing yet."""
        return type(None), ()


_FIXED = (torch.Tensor, tuple, str, type(None))


class _Ops(NamedTuple):
    keep: Callable[..., Any]
    check: Callable[..., Any]
    release: Callable[..., Any]


@functools.cache
def _ops() -> _Ops:
    """Found when first asked for: the library is loaded by then."""
    ops = torch.ops.adsc_kernels
    return _Ops(*(op.default._op for op in (ops.keep_caches, ops.check_caches, ops.release_caches)))
