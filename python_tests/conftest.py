"""The order in which tests run."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first: of several workers none is left with one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
