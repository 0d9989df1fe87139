"""What the model class for lmms-eval uses of that package, where it isn't installed."""

from __future__ import annotations

import abc
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


class CacheHook:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.told.append((attr, req, res))


class lmms(abc.ABC):
    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook()
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass
class Instance:
    request_type: str
    arguments: tuple[Any, ...]
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


def install() -> None:
    """Into this process, in place of the package."""
    for name, contents in (
        ("lmms_eval", {}),
        ("lmms_eval.api", {}),
        ("lmms_eval.api.model", {"lmms": lmms}),
        ("lmms_eval.api.instance", {"Instance": Instance}),
        ("lmms_eval.models", {}),
        ("lmms_eval.models.registry_v2", {"ModelManifest": ModelManifest}),
    ):
        module = ModuleType(name)
        module.__dict__.update(contents)
        sys.modules[name] = module
