"""One backend for a whole run, which the environment names: `make gpu-test` runs all in turn."""

import sys
from collections.abc import Iterator
from itertools import groupby

import pytest
import torch
from gpu_device import BACKEND, DRY_RUN
from hypothesis import HealthCheck, settings

import adsc_kernels as adsc
from adsc_kernels.ops import _dispatch

# Beside the examples that name each form outright. Triton compiles a kernel for many of the shapes.
EXAMPLES = 3 if DRY_RUN else {"cuda": 40, "triton": 10}.get(BACKEND, 40)
settings.register_profile(
    "gpu",
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
settings.load_profile("gpu")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_case: a dry run takes all cases, not the first alone")


def pytest_sessionstart() -> None:
    if not DRY_RUN and not torch.cuda.is_available():
        pytest.exit("GPU tests: no CUDA device here, nothing was run", returncode=0)
    works, why = adsc.available_backends()[BACKEND]
    if not works:
        pytest.exit(f"GPU tests: backend {BACKEND!r} does not work here: {why}", returncode=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A dry run takes the first case of a test whose cases run the same lines."""
    if DRY_RUN:
        by_test = groupby(items, lambda item: item.nodeid.partition("[")[0])
        items[:] = [
            case
            for _, cases in by_test
            for number, case in enumerate(cases)
            if number == 0 or case.get_closest_marker("every_case")
        ]


@pytest.fixture(autouse=True, scope="session")
def backend() -> Iterator[str]:
    with adsc.backend(BACKEND):
        yield BACKEND


def drawing() -> bool:
    """Whether hypothesis is drawing from a strategy: one of its do_draw is being executed."""
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "do_draw" and module.startswith("hypothesis"):
            return True
        frame = frame.f_back
    return False


@pytest.fixture(autouse=True)
def as_on_the_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy draws CPU tensors, which the device's backend refuses; so a dry run does too."""
    resolve, native_for = _dispatch.resolve, _dispatch.native_for

    def native_outside_of_strategies(x: torch.Tensor) -> bool:
        if drawing():
            resolve_outside_of_strategies(x.device)
        return native_for(x)

    def resolve_outside_of_strategies(device: torch.device) -> str:
        found = resolve(device)
        if device.type == "cpu" and found != "reference" and drawing():
            raise AssertionError(f"a strategy calls an op under backend {BACKEND!r}")
        return found

    if DRY_RUN and getattr(request.function, "is_hypothesis_test", False):
        monkeypatch.setattr(_dispatch, "resolve", resolve_outside_of_strategies)
        monkeypatch.setattr(_dispatch, "native_for", native_outside_of_strategies)
