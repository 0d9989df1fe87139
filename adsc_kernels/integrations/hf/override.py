"""An attribute of one object in place of a method of its class, which can be taken back."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


class Override:
    """Calls `around(owner, method, *args, **kwargs)` where the owner's method was called.

    It refers to its owner weakly, so that a model is freed as soon as it is no longer used; copies
    of the owner have one of their own.
    """

    def __init__(
        self, owner: nn.Module, name: str, around: Callable[..., Any], extra: tuple[str, ...] = ()
    ) -> None:
        self.name, self.around = name, around
        self.before = owner.__dict__.get(name)  # another library's override
        method = getattr(owner, name)
        # `generate` looks here for the arguments that it may hand on.
        signature = inspect.signature(method)
        keyword_only = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in extra]
        known = list(signature.parameters.values())
        rest = [p for p in known if p.kind is p.VAR_KEYWORD]
        known = [p for p in known if p.kind is not p.VAR_KEYWORD]
        self.__signature__ = signature.replace(parameters=known + keyword_only + rest)
        self.owner: Any = weakref.ref(owner)
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner()
        # Not a bound method: where Dynamo breaks a graph it would look that up on the owner again.
        method = self.before or partial(getattr(type(owner), self.name), owner)
        return self.around(owner, method, *args, **kwargs)

    def remove(self) -> None:
        """The owner has its method back."""
        owner = self.owner()
        delattr(owner, self.name)
        if self.before is not None:
            setattr(owner, self.name, self.before)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "owner": self.owner()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, owner=weakref.ref(state["owner"]))
