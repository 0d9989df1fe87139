"""Examples that name each form of a test's arguments outright, so that no run depends on luck."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from hypothesis import example

Test = TypeVar("Test", bound=Callable[..., Any])


def each_form(base: dict[str, Any], **others: Iterable[Any]) -> Callable[[Test], Test]:
    """Examples for @given: `base`, and again with each other value of each argument in turn."""

    def decorate(test: Test) -> Test:
        changes = [{name: value} for name, values in others.items() for value in values]
        for change in [{}, *changes]:
            test = example(**{**base, **change})(test)
        return test

    return decorate
