"""Which calls pass the dispatcher by: those in which it would do nothing of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import adsc_kernels as adsc
from adsc_kernels import ops

ROWS = torch.tensor([2, 0])
COMPLEX = torch.view_as_complex(torch.arange(24.0).reshape(3, 4, 2))


@pytest.fixture(autouse=True)
def in_triton() -> Iterator[None]:
    with adsc.backend("triton"):
        yield


class Seen(TorchDispatchMode):
    """The names of the ops that a mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Kind(torch.Tensor):
    """A tensor of a kind of its own."""


@pytest.mark.parametrize(
    "x", [COMPLEX.conj(), torch._neg_view(COMPLEX.real.clone())], ids=["conjugate", "negative"]
)
def test_what_stands_for_other_numbers(x: torch.Tensor) -> None:
    """A view whose numbers are not the bits in memory is read as what it stands for."""
    assert torch.equal(ops.downsample(x, keep_indices=ROWS), x[ROWS])
    assert torch.equal(ops.downsample_many([ROWS.new_ones(3), x], keep_indices=ROWS)[1], x[ROWS])


def test_modes_and_profiles_see_the_op() -> None:
    x, cache = torch.ones(3, 4), torch.ones(1, 3, 1, 4)
    rows = {"keep_indices": ROWS[1:], "cu_kept": [0, 1], "seq_lens": [3]}
    with Seen() as seen:
        ops.downsample(x, keep_indices=ROWS)
        ops.compact_kv_([cache], [cache.clone()], **rows)
    assert "adsc_triton::downsample" in seen.names
    assert "adsc_triton::compact_kv_" in seen.names
    with torch.profiler.profile() as profile:
        ops.downsample(x, keep_indices=ROWS)
    assert "adsc_triton::downsample" in [event.name for event in profile.events()]


def test_gradients_and_kinds_go_the_whole_way() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    ops.downsample(x, keep_indices=ROWS).sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [1, 0, 1]
    kind = torch.ones(3, 4).as_subclass(Kind)
    assert type(ops.downsample(kind, keep_indices=ROWS)) is Kind


def test_a_cache_that_is_written_is_seen_by_autograd() -> None:
    k, v = torch.ones(1, 3, 1, 4), torch.ones(1, 3, 1, 4)
    before = k._version
    ops.compact_kv_([k], [v], keep_indices=ROWS[1:], cu_kept=[0, 1], seq_lens=[3])
    assert k._version == before + 1
