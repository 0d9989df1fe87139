"""Under torch.compile: opcheck, one graph, no recompilation when lengths change, gradients.

The samples are those of the CPU tests, with their tensors on the device.
"""

from __future__ import annotations

import pytest
import torch
from cases.segment_tables import source_rows
from gpu_device import BACKEND, DEVICE, DRY_RUN, cases_here, to_device
from torch import Tensor
from torch.library import opcheck

from adsc_kernels.rows import Stage

cases = cases_here("compile")
fresh_dynamo = cases.fresh_dynamo  # a fixture for every test
OPS = torch.ops.adsc_triton if BACKEND == "triton" else torch.ops.adsc_kernels
COMPILER = "aot_eager" if DRY_RUN else "inductor"


@pytest.mark.parametrize("name", cases.SAMPLES)
def test_opcheck(name: str) -> None:
    op, arguments = cases.SAMPLES[name]
    opcheck(getattr(OPS, op.__name__).default, arguments)


def step(batch: int, text: int) -> tuple[tuple[Tensor, ...], Stage]:
    stage = to_device(cases.faked(batch, text))
    return tuple(t.to(DEVICE) for t in cases.batch_of(stage)), stage


def test_no_recompile_when_lengths_change() -> None:
    compiled = torch.compile(cases.boundary, fullgraph=True, dynamic=True, backend=COMPILER)
    for i, (batch, text) in enumerate([(3, 11), (5, 30), (9, 12)]):
        inputs, stage = step(batch, text)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            outputs = compiled(*inputs, stage)
        cases.same(outputs, cases.boundary(*inputs, stage))


def test_no_recompile_with_indices() -> None:
    function = cases.boundary_of_indices
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=COMPILER)
    for i, (batch, text) in enumerate([(2, 11), (3, 30), (9, 12)]):
        inputs, stage = step(batch, text)
        rows = torch.tensor(source_rows(stage), device=DEVICE)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            outputs = compiled(*inputs, rows)
        cases.same(outputs, function(*inputs, rows))


def test_gradients() -> None:
    inputs, stage = step(2, 11)
    compiled = torch.compile(cases.boundary, fullgraph=True, backend=COMPILER)
    grads = []
    for function in (compiled, cases.boundary):
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
        outputs = function(*leaves, stage)
        torch.autograd.backward(outputs[:3], [torch.ones_like(t) for t in outputs[:3]])
        grads.append([leaf.grad for leaf in leaves[:3]])
    for mine, truth in zip(*grads, strict=True):
        torch.testing.assert_close(mine, truth)


def test_reduce_overhead() -> None:
    """Inductor's own CUDA graphs around the ops."""
    inputs, stage = step(2, 11)
    mode = None if DRY_RUN else "reduce-overhead"
    backend = COMPILER if DRY_RUN else "inductor"
    compiled = torch.compile(cases.boundary, fullgraph=True, mode=mode, backend=backend)
    for _ in range(4):  # warm-up, recording, replays
        inputs = tuple(t.clone() for t in inputs)
        outputs = tuple(t.clone() for t in compiled(*inputs, stage))
        cases.same(outputs, cases.boundary(*inputs, stage))
