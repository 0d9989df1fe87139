"""The ops under torch.compile: opcheck, one graph, no recompilation when only lengths change."""
# ruff: noqa: E501 (tables of cases, one a line)

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from segment_tables import FakeStage, by_stage, image_stage, stage_of
from torch import Tensor
from torch.library import opcheck

from adsc_kernels import CompressionSchedule, make_plan, ops, reference
from adsc_kernels.backend import backend
from adsc_kernels.rows import Stage

OPS = torch.ops.adsc_kernels
STAGE = stage_of([[0, 0, 3, 3, 0, 0], [3, 3, 6, 3, 0, 0], [6, 9, 0, 0, 0, 0]], 6, 9)
TABLE = STAGE.segments
ROWS = torch.tensor([8, 0, 0, 3])
CU = torch.tensor([0, 9], dtype=torch.int32)
SPANS = torch.tensor([[0, 3, 6, 2, 3]], dtype=torch.int32)


def x(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


SAMPLES = {
    "downsample": (OPS.downsample, (x(9, 4), TABLE, None, 6)),
    "downsample indices": (OPS.downsample, (x(9), None, ROWS, 4)),
    "downsample strided": (OPS.downsample, (torch.randn(9, 8)[:, :4], TABLE, None, 6)),
    "downsample to nothing": (OPS.downsample, (x(9, 4), None, ROWS[:0], 0)),
    "downsample_many": (OPS.downsample_many, ([x(9, 4), torch.arange(9), x(9, grad=False)], TABLE, None, 6)),
    "upsample_grad": (OPS.upsample_grad, (x(6, 4), TABLE, None, 9)),
    "upsample_grad indices": (OPS.upsample_grad, (x(4, dtype=torch.bfloat16), None, ROWS, 9)),
    "downsample_add_rms_norm": (OPS.downsample_add_rms_norm, (x(9, 4), x(9, 4), x(4), TABLE, None, 6, 1e-6)),
    "norm indices": (OPS.downsample_add_rms_norm, (x(9, 4), x(9, 4), x(4), None, ROWS, 4, 1e-6)),
    "rebuild_metadata": (OPS.rebuild_metadata, (CU, SPANS, [1, 2], "center", 0)),
    "rebuild_metadata grid": (OPS.rebuild_metadata, (CU, SPANS, [1, 2, 2, 3], "grid", 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    op, arguments = SAMPLES[name]
    opcheck(op.default, arguments)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def boundary(
    hidden: Tensor, residual: Tensor, weight: Tensor, positions: Tensor, stage: Stage
) -> tuple[Tensor, ...]:
    """What a decoder does at a boundary, with work of its own on either side."""
    normed, residual = ops.downsample_add_rms_norm(hidden * 2, residual, weight, stage)
    moved, positions = ops.downsample_many([hidden, positions], stage)
    return normed + 1, residual, ops.downsample(hidden, stage) + moved, positions


def boundary_of_indices(
    hidden: Tensor, residual: Tensor, weight: Tensor, positions: Tensor, rows: Tensor
) -> tuple[Tensor, ...]:
    normed, residual = ops.downsample_add_rms_norm(hidden, residual, weight, keep_indices=rows)
    return normed, residual, *ops.downsample_many([hidden, positions], keep_indices=rows)


def planned(batch: int, text: int) -> Stage:
    schedule = CompressionSchedule.parse("2:1/4", num_layers=4)
    length = 24 + text
    cu_seqlens = [length * b for b in range(batch + 1)]
    return make_plan(schedule, cu_seqlens, [(b, text // 2, 24) for b in range(batch)]).stages[1]


def faked(batch: int, text: int) -> FakeStage:
    return image_stage(batch, text=text, vision=24, kept=6)


def batch_of(stage: Stage) -> tuple[Tensor, ...]:
    rows = stage.num_tokens_in
    return torch.randn(rows, 32), torch.randn(rows, 32), torch.randn(32), torch.arange(rows)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right)


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
        inputs = (*batch_of(stage), torch.tensor(reference.source_rows(*by_stage(stage))))
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
