"""The ops under torch.compile: opcheck, one graph, no recompilation when only lengths change."""

import copy
from collections.abc import Callable

import pytest
import torch
from cases.compile import (
    CU,
    SAMPLES,
    SPANS,
    batch_of,
    boundary,
    boundary_of_indices,
    faked,
    fresh_dynamo,
    planned,
    same,
)
from cases.segment_tables import source_rows
from torch import Tensor
from torch.library import opcheck

from adsc_kernels import ops
from adsc_kernels.backend import backend
from adsc_kernels.rows import Stage

__all__ = ["fresh_dynamo"]  # a fixture for every test


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    op, arguments = SAMPLES[name]
    opcheck(op.default, arguments)


@pytest.mark.parametrize("make_stage", [faked, planned])
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_no_recompile_when_lengths_change(
    make_stage: Callable[[int, int], Stage], dynamic: bool | None
) -> None:
    """dynamic=True compiles once; by itself Dynamo compiles the first length alone, then all."""
    compiled = torch.compile(boundary, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    # Tables of stages from one call to the next differ in every length: rows, segments, survivors.
    # None has six segments first, which Dynamo's duck sizing would take for the six columns.
    shapes = [(3, 11), (5, 30), (4, 7), (2, 300), (9, 12)]
    warm = 1 if dynamic else 2
    for i, (batch, text) in enumerate(shapes):
        stage = make_stage(batch, text)
        inputs = batch_of(stage)
        stance = "default" if i < warm else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            outputs = compiled(*inputs, stage)
        same(outputs, boundary(*inputs, stage))


def test_no_recompile_with_indices() -> None:
    compiled = torch.compile(boundary_of_indices, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, (batch, text) in enumerate([(2, 11), (3, 30), (9, 12)]):
        stage = faked(batch, text)
        inputs = (*batch_of(stage), torch.tensor(source_rows(stage)))
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            outputs = compiled(*inputs)
        same(outputs, boundary_of_indices(*inputs))


def test_gradients() -> None:
    stage = faked(2, 11)
    inputs = batch_of(stage)
    eager = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    other = copy.deepcopy(eager)
    compiled = torch.compile(boundary, fullgraph=True, backend="aot_eager")
    for function, arguments in ((compiled, eager), (boundary, other)):
        outputs = function(*arguments, stage)
        torch.autograd.backward(outputs[:3], [torch.ones_like(t) for t in outputs[:3]])
    for mine, truth in zip(eager[:3], other[:3], strict=True):
        torch.testing.assert_close(mine.grad, truth.grad)


def test_inductor() -> None:
    """Ops alone, so that there is nothing for it to hand to a C++ compiler."""
    stage = faked(2, 11)
    hidden, residual, weight, positions = batch_of(stage)

    def moved(hidden: Tensor, positions: Tensor, stage: Stage) -> tuple[Tensor, ...]:
        normed, left = ops.downsample_add_rms_norm(hidden, residual, weight, stage)
        return normed, left, *ops.downsample_many([hidden, positions], stage)

    compiled = torch.compile(moved, fullgraph=True)
    same(compiled(hidden, positions, stage), moved(hidden, positions, stage))


def test_rebuild_metadata_is_one_graph() -> None:
    """Layout and movement of two boundaries with no read of a tensor's values on the way."""

    def two(cu_seqlens: Tensor, spans: Tensor) -> ops.Metadata:
        first = ops.rebuild_metadata(cu_seqlens, spans, "1/2", "center")
        return ops.rebuild_metadata(first.cu_seqlens, first.spans, (1, 3))

    compiled = torch.compile(two, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, batch in enumerate([4, 5, 3]):
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * 20
        spans = torch.tensor([[b, b, 9] for b in range(batch)], dtype=torch.int32)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            outputs = compiled(cu_seqlens, spans)
        same(outputs, two(cu_seqlens, spans))


def test_a_rebuilt_stage_in_a_graph() -> None:
    """The caller's row counts (an upper bound would do on a device) make a stage out of tensors."""

    def step(hidden: Tensor, cu_seqlens: Tensor, spans: Tensor, num_tokens: int) -> Tensor:
        metadata = ops.rebuild_metadata(cu_seqlens, spans, "1/2")
        return ops.downsample(hidden, metadata.stage(num_tokens, hidden.shape[0]))

    arguments = (torch.randn(9, 4), CU, SPANS[:, :3].clone(), 6)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), step(*arguments))


def test_the_backend_is_guarded() -> None:
    """A graph compiled for one backend is not used for another."""
    stage = faked(2, 11)
    hidden = torch.randn(stage.num_tokens_in, 4)
    compiled = torch.compile(lambda h: ops.downsample(h, stage), backend="aot_eager")
    first = compiled(hidden)
    frozen = torch.compiler.set_stance("fail_on_recompile")
    with backend("reference"), pytest.raises(RuntimeError, match=r"(?i)recompil"), frozen:
        compiled(hidden)
    assert torch.equal(compiled(hidden), first)


def test_a_wrong_length_is_an_error_in_the_graph_too() -> None:
    stage = faked(2, 11)
    compiled = torch.compile(lambda h: ops.downsample(h, stage), backend="aot_eager", dynamic=True)
    compiled(torch.randn(stage.num_tokens_in, 4))
    with pytest.raises(Exception, match=r"expected \d+ rows"):
        compiled(torch.randn(stage.num_tokens_in - 1, 4))
