"""boundary_step against the ops that it joins and against the reference."""
# ruff: noqa: E501 (tables of cases, one a line)

import pytest
import torch
from cases.boundary_step import (
    DTYPES,
    Kind,
    Rows,
    boundaries,
    check,
    drawn,
    moved,
    others_of,
    same_step,
)
from cases.rebuild_metadata import int32
from cases.refused import BY_THE_OP
from cases.refused.boundary_step import BAD_CALLS, CU, LAYOUT, SPANS, STAGE, H, P, R, W
from cases.row_bits import bits, same_bits
from cases.run import on
from cases.segment_tables import FakeStage, image_stage, source_rows, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from adsc_kernels import CompressionSchedule, make_plan, ops
from adsc_kernels.backend import backend


@settings(max_examples=100, deadline=None)
@given(
    stages(),
    st.sampled_from([0, 1, 7, 64, 513]),
    st.sampled_from(DTYPES),
    st.booleans(),
    others_of(),
)
def test_equals_the_ops_it_joins(
    stage: FakeStage,
    width: int,
    dtype: torch.dtype,
    norm: bool,
    kinds: list[Kind],
) -> None:
    inputs = drawn(stage.num_tokens_in, width, dtype)
    hidden, residual, weight = inputs.values()
    rest = moved(stage.num_tokens_in, kinds)
    rows = torch.tensor(source_rows(stage), dtype=torch.int32)
    for source in ({"stage": stage}, {"keep_indices": rows}):
        if norm:
            out = ops.boundary_step(**inputs, eps=1e-5, others=rest, **source)
            normed, residual_out = ops.downsample_add_rms_norm(
                hidden, residual, weight, eps=1e-5, **source
            )
            assert out.residual is not None
            assert same_bits(out.hidden, normed) and same_bits(out.residual, residual_out)
        else:
            out = ops.boundary_step(hidden, others=rest, **source)
            assert same_bits(out.hidden, ops.downsample(hidden, **source)) and out.residual is None
        assert out.metadata is None
        if rest:
            want = ops.downsample_many(rest, **source)
            assert all(same_bits(x, y) for x, y in zip(out.others, want, strict=True))
        with backend("reference"):
            arguments = inputs if norm else {"hidden": hidden}
            same_step(out, ops.boundary_step(**arguments, eps=1e-5, others=rest, **source))


@settings(max_examples=100, deadline=None)
@given(boundaries(forms=("layout",)))
def test_a_layout_equals_the_reference(rows: Rows) -> None:
    """Movement and metadata; what num_tokens has to spare is zeros, rows behind are not read."""
    out = check(rows, on("cpu"))
    layout = rows.arguments["layout"]
    metadata = ops.rebuild_metadata(
        layout.cu_seqlens, layout.spans, layout.keep, layout.pattern, layout.max_height
    )
    assert out.metadata is not None
    assert all(torch.equal(x, y) for x, y in zip(out.metadata, metadata, strict=True))
    total = int(metadata.num_tokens)
    stage = metadata.stage(total, len(rows.arguments["hidden"]))
    same = ops.boundary_step(**{**rows.arguments, "layout": None, "stage": stage})
    assert same_bits(out.hidden[:total], same.hidden)
    for x in (out.hidden, *([] if out.residual is None else [out.residual]), *out.others):
        assert x.shape[0] == layout.num_tokens
        assert not bits(x[total:]).any()


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_zeros_stay_zeros_with_any_weight(eps: float) -> None:
    inputs = drawn(4, 8)
    inputs["weight"][:] = torch.inf
    layout = ops.BatchLayout(int32([0, 4], 2), int32([], 0, 3), 1, num_tokens=6)
    out = ops.boundary_step(**inputs, eps=eps, layout=layout)
    assert not out.hidden[4:].any()


def test_more_tensors_than_one_launch_takes() -> None:
    stage = image_stage()
    xs = [torch.arange(stage.num_tokens_in) + i for i in range(40)]
    out = ops.boundary_step(xs[0], stage, others=xs[1:])
    want = ops.downsample_many(xs, stage)
    assert all(torch.equal(a, b) for a, b in zip((out.hidden, *out.others), want, strict=True))


def test_of_a_plan() -> None:
    schedule = CompressionSchedule.parse("2:1/4", num_layers=4)
    plan = make_plan(schedule, [0, 40, 60], [(0, 5, 24)])
    positions = plan.stages[0].positions
    out = ops.boundary_step(torch.randn(60, 8), plan.stages[1], others=[positions])
    assert torch.equal(out.others[0], plan.stages[1].positions)


# ---- Gradients and tracing ----


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    "source", [{"stage": STAGE}, {"keep_indices": torch.tensor([6, 0, 0])}, {"layout": LAYOUT}]
)
def test_gradcheck(norm: bool, source: dict[str, object]) -> None:
    inputs = {name: x.double().requires_grad_() for name, x in drawn(7, 4).items()}
    other = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(7)
    if not norm:
        inputs = {"hidden": inputs["hidden"]}

    def op(other: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(inputs, values, strict=True))
        out = ops.boundary_step(**given, others=[positions, other], **source)
        residual = [] if out.residual is None else [out.residual]
        return out.hidden, out.others[1], *residual

    assert torch.autograd.gradcheck(op, (other, *inputs.values()))
    if "layout" not in source:
        assert torch.autograd.gradgradcheck(op, (other, *inputs.values()))


OP = torch.ops.adsc_kernels.boundary_step.default
NO_LAYOUT: tuple[object, ...] = (None, None, [], "start", 0)
SAMPLES = {
    "norm": (H.clone().requires_grad_(), R, W, 1e-6, [P], STAGE.segments, None, *NO_LAYOUT, 5),
    "move": (H, None, None, 1e-6, [P, R], None, torch.tensor([6, 0]), *NO_LAYOUT, 2),
    "layout": (H, R, W, 1e-6, [P], None, None, CU, SPANS, [1, 2], "center", 0, 7),
    "grid": (H, None, None, 1e-6, [], None, None, CU, int32([[0, 1, 6, 2, 3]], 1, 5), [1, 2, 1, 3], "grid", 4, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    opcheck(OP, SAMPLES[name])


def test_one_graph_for_all_lengths() -> None:
    def step(
        hidden: Tensor, residual: Tensor, cu_seqlens: Tensor, spans: Tensor
    ) -> ops.BoundaryStep:
        layout = ops.BatchLayout(cu_seqlens, spans, "1/2", num_tokens=hidden.shape[0])
        return ops.boundary_step(
            hidden * 2, residual=residual, weight=W, others=[residual], layout=layout
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, batch in enumerate([7, 5, 3]):  # none the width: Dynamo would tie them
        x = drawn(batch * 20, 4)
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * 20
        spans = int32([[b, b, 9] for b in range(batch)], batch, 3)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            out = compiled(x["hidden"], x["residual"], cu_seqlens, spans)
        same_step(out, step(x["hidden"], x["residual"], cu_seqlens, spans))


# ---- Bad input ----


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name: str) -> None:
    bad_call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        bad_call()


def test_the_op_itself_checks_too() -> None:
    rows = STAGE.segments
    for arguments, message in [
        ((H, R, None, 0.0, [], rows, None, *NO_LAYOUT, 5), "^residual, weight: .*only residual"),
        ((H, None, None, 0.0, [], rows, P, *NO_LAYOUT, 5), "^segments, keep_indices: .*both"),
        (
            (H, None, None, 0.0, [], rows, None, CU, None, [1, 2], "start", 0, 5),
            "^cu_seqlens, spans: .*only cu",
        ),
        (
            (H, None, None, 0.0, [], rows, None, CU, SPANS, [1, 2], "start", 0, 5),
            "^segments, keep_indices: .*neither",
        ),
        ((H, R, W[:3], 0.0, [], rows, None, *NO_LAYOUT, 5), r"^weight: .*\[4\]"),
        ((H, None, None, 0.0, [P[:3]], rows, None, *NO_LAYOUT, 5), "^others: .*7, got 3"),
        ((H, None, None, 0.0, [], None, None, CU, SPANS, [3, 2], "start", 0, 5), "^keep: .*3/2"),
        ((H, None, None, 0.0, [], None, None, CU, SPANS, [1, 2], "start", 0, -1), "^num_tokens: "),
    ]:
        with pytest.raises(BY_THE_OP, match=message):
            OP(*arguments)
