"""What transformers calls by different names from release to release."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from transformers.cache_utils import Cache

from adsc_kernels.errors import UnsupportedError

CACHE_NAMES = ("cache", "past_key_values")


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names that a forward takes, `self` left out."""
    return tuple(name for name in inspect.signature(function).parameters if name != "self")


@cache
def known_parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The same of a function of a module or a class, looked up once; no model's, which would stay
    alive by it."""
    return parameters(function)


def cache_name(names: tuple[str, ...]) -> str:
    """What these parameters call the cache."""
    return CACHE_NAMES[0] if CACHE_NAMES[0] in names else CACHE_NAMES[1]


def get_cache(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among keyword arguments, by any of its names; UnsupportedError for another type."""
    found = next((arguments[n] for n in CACHE_NAMES if arguments.get(n) is not None), None)
    if found is not None and not isinstance(found, Cache):
        raise UnsupportedError(f"cache: expected a Cache, got {type(found).__name__}")
    return found


def fitting(function: Callable[..., Any], **values: Any) -> dict[str, Any]:
    """Those of `values` that the function has a parameter for; a cache under its name there."""
    names = known_parameters(function)
    values[cache_name(names)] = values.pop("cache", None)
    if "inputs_embeds" not in names:
        values["input_embeds"] = values.pop("inputs_embeds")
    return {name: value for name, value in values.items() if name in names}


def writes_where_told() -> bool:
    """Whether the decoder tells caches which columns to write, those of stage 0 (5.0's does)."""
    return "cache_position" in known_parameters(Cache.get_mask_sizes)


def columns_seen(staged: Cache, rows: int, device: torch.device) -> int:
    """How many columns of the cache's first layer a pass of so many rows sees, unseen ones of a
    static cache included."""
    new: Any = rows
    if writes_where_told():
        new = torch.arange(rows, device=device) + staged.get_seq_length()
    return sum(staged.get_mask_sizes(new, 0))
