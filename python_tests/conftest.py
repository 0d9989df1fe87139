"""How tests run: in which order, how long an example may take, what Python needn't look at."""

import gc

import pytest
from hypothesis import settings

# An example has no deadline: on a busy machine any of them takes longer than usual at times.
settings.register_profile("adsc", deadline=None)
settings.load_profile("adsc")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first: of several workers none is left with one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Nothing of what was imported becomes garbage, and to look through it takes long."""
    gc.collect()
    gc.freeze()
