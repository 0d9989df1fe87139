"""One backend for a whole run, which the environment names: `make gpu-test` runs all in turn."""

from collections.abc import Iterator
from itertools import groupby, islice

import pytest
import torch
from gpu_device import BACKEND, DRY_RUN
from hypothesis import settings

import adsc_kernels as adsc

# Triton compiles a kernel for many of the shapes drawn.
EXAMPLES = {"cuda": 200, "triton": 40}
settings.register_profile(
    "gpu", max_examples=3 if DRY_RUN else EXAMPLES.get(BACKEND, 40), deadline=None, derandomize=True
)
settings.load_profile("gpu")


def pytest_sessionstart() -> None:
    if not DRY_RUN and not torch.cuda.is_available():
        pytest.exit("GPU tests: no CUDA device here, nothing was run", returncode=0)
    works, why = adsc.available_backends()[BACKEND]
    if not works:
        pytest.exit(f"GPU tests: backend {BACKEND!r} does not work here: {why}", returncode=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A dry run takes the first case of each test: enough to execute every line."""
    if DRY_RUN:
        by_test = groupby(items, lambda item: item.nodeid.partition("[")[0])
        items[:] = [item for _, cases in by_test for item in islice(cases, 1)]


@pytest.fixture(autouse=True, scope="session")
def backend() -> Iterator[str]:
    with adsc.backend(BACKEND):
        yield BACKEND
