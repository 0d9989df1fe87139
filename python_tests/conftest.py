"""The order in which tests run, and what Python needn't look at while they do."""

import gc

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first: of several workers none is left with one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Nothing of what was imported becomes garbage, and to look through it takes long."""
    gc.collect()
    gc.freeze()
