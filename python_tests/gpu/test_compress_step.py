"""compress_step on the device against the reference on the CPU: rows and caches, every byte."""

from __future__ import annotations

import pytest
import torch
from cases.boundary_step import FORMS, boundaries
from cases.compact import dense_cases, paged_cases
from cases.compress_step import check
from gpu_caches import TEXT, VISION, image_stage, random
from gpu_device import BACKEND, DEVICE, DRY_RUN, another_stream, capture, hold_back, run_here
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels import ops

HIDDEN = 64 if DRY_RUN else 4096


CACHES = {"dense": dense_cases(), "paged": paged_cases()}


@pytest.mark.every_case
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("form", FORMS)
@given(data=st.data(), uploaded=st.booleans())
def test_equals_the_reference(cache: str, form: str, data: st.DataObject, uploaded: bool) -> None:
    rows = data.draw(boundaries(forms=(form,)))
    check(data.draw(CACHES[cache]), rows, run_here, uploaded=uploaded)


# ---- A step of a real size ----


class Step:
    """What a decoder does at its first boundary: rows with norm and positions, caches of layers."""

    def __init__(self, batch: int = 4, layers: int = 8) -> None:
        self.stage = image_stage(batch, "1/4")
        count = self.stage.num_tokens_in
        bf16 = {"device": DEVICE, "dtype": torch.bfloat16}
        self.rows = {
            "hidden": torch.randn(count, HIDDEN, **bf16),
            "residual": torch.randn(count, HIDDEN, **bf16),
            "weight": torch.rand(HIDDEN, **bf16),
        }
        self.positions = torch.arange(count, device=DEVICE)
        self.caches = [random(batch, TEXT + VISION, 8, 128) for _ in range(2 * layers)]

    def copy(self) -> list[Tensor]:
        return [cache.clone() for cache in self.caches]

    def fused(self, caches: list[Tensor]) -> ops.CompressStep:
        half = len(caches) // 2
        cache = ops.DenseCache(caches[:half], caches[half:])
        return ops.compress_step(
            cache=cache, stage=self.stage, **self.rows, others=[self.positions]
        )

    def pair(self, caches: list[Tensor]) -> ops.BoundaryStep:
        half = len(caches) // 2
        ops.compact_kv_(caches[:half], caches[half:], self.stage)
        return ops.boundary_step(stage=self.stage, **self.rows, others=[self.positions])


@pytest.mark.parametrize("layers", [1, 8, 40])
def test_equals_its_two_ops(layers: int) -> None:
    step = Step(layers=2 if DRY_RUN else layers)
    mine, theirs = step.copy(), step.copy()
    got, wanted = step.fused(mine), step.pair(theirs)
    assert all(map(torch.equal, mine, theirs))
    torch.testing.assert_close(got.boundary.hidden, wanted.hidden)
    assert wanted.residual is not None and torch.equal(got.boundary.residual, wanted.residual)
    assert torch.equal(got.boundary.others[0], wanted.others[0])


def test_is_one_launch() -> None:
    if DRY_RUN or BACKEND != "cuda":
        pytest.skip("counts CUDA kernels; in Triton there are several")
    step = Step()
    caches = step.copy()
    step.fused(caches)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step.fused(caches)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if "kernel" in e.name and "Launch" not in e.name]
    assert len(kernels) == 1 and "compress_step_kernel" in kernels[0], kernels


def test_captured_with_other_contents() -> None:
    step = Step(layers=2)
    caches = step.copy()
    replay, (hidden,) = capture(lambda: step.fused(caches).boundary.hidden)
    for _ in range(2):
        step.rows["hidden"].normal_()
        for cache, new in zip(caches, step.caches, strict=True):
            cache.copy_(new.random_(256))
        replay()
        wanted = step.copy()
        torch.testing.assert_close(hidden, step.pair(wanted).hidden)
        assert all(map(torch.equal, caches, wanted))


def test_current_stream() -> None:
    step = Step(layers=2)
    wanted, caches = step.copy(), [torch.zeros_like(x) for x in step.caches]
    truth = step.pair(wanted)
    torch.zeros(1, device=DEVICE).item()
    with another_stream():
        hold_back(30)
        for cache, new in zip(caches, step.caches, strict=True):
            cache.copy_(new)
        got = step.fused(caches)
    assert all(map(torch.equal, caches, wanted))
    torch.testing.assert_close(got.boundary.hidden, truth.hidden)


def test_takes_no_memory_but_its_outputs() -> None:
    if DRY_RUN:
        pytest.skip("counts CUDA memory")
    step = Step()
    caches = step.copy()
    step.fused(caches)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    done = step.fused(caches)
    outputs = [done.boundary.hidden, done.boundary.residual, *done.boundary.others]
    size = sum(x.nbytes for x in outputs if x is not None)
    assert torch.cuda.max_memory_allocated() - before <= size + (1 << 16)
