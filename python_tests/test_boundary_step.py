"""boundary_step against the ops that it joins and against the reference."""
# ruff: noqa: E501 (tables of cases, one a line)

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from cases.row_bits import STRIDES, random_bits, same_bits, strided_rows
from cases.segment_tables import FakeStage, image_stage, stage_of, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rebuild_metadata import PATTERNS, fractions, int32, layouts
from torch import Tensor
from torch.library import opcheck

from adsc_kernels import CompressionSchedule, make_plan, ops, reference
from adsc_kernels.backend import backend

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
others = st.lists(
    st.tuples(
        st.sampled_from([torch.int64, torch.float32, torch.bool, torch.bfloat16]),
        st.sampled_from([(), (3,), (64,), (2, 8), (0,)]),
        st.sampled_from(STRIDES),
    ),
    max_size=4,
)


def drawn(rows: int, hidden: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + hidden)
    values = [torch.randn(rows, hidden, generator=generator) for _ in range(2)]
    values.append(torch.randn(hidden, generator=generator) + 1)
    names = ("hidden", "residual", "weight")
    return {name: value.to(dtype) for name, value in zip(names, values, strict=True)}


def moved(rows: int, kinds: list[tuple[torch.dtype, tuple[int, ...], str]]) -> list[Tensor]:
    return [
        strided_rows(random_bits(rows, trailing, dtype, i), stride)
        for i, (dtype, trailing, stride) in enumerate(kinds)
    ]


def same_step(a: ops.BoundaryStep, b: ops.BoundaryStep) -> None:
    torch.testing.assert_close(a.hidden, b.hidden)
    assert (a.residual is None) == (b.residual is None)
    if a.residual is not None and b.residual is not None:
        assert same_bits(a.residual, b.residual)
    assert len(a.others) == len(b.others)
    assert all(
        same_bits(x, y) and x.is_contiguous() for x, y in zip(a.others, b.others, strict=True)
    )
    assert (a.metadata is None) == (b.metadata is None)
    assert all(same_bits(x, y) for x, y in zip(a.metadata or (), b.metadata or (), strict=True))


@settings(max_examples=100, deadline=None)
@given(
    stages(), st.sampled_from([0, 1, 7, 64, 513]), st.sampled_from(DTYPES), st.booleans(), others
)
def test_equals_the_ops_it_joins(
    stage: FakeStage,
    width: int,
    dtype: torch.dtype,
    norm: bool,
    kinds: list[tuple[torch.dtype, tuple[int, ...], str]],
) -> None:
    inputs = drawn(stage.num_tokens_in, width, dtype)
    hidden, residual, weight = inputs.values()
    rest = moved(stage.num_tokens_in, kinds)
    rows = torch.tensor(reference.source_rows(stage), dtype=torch.int32)
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
@given(
    layout=layouts(),
    keep=fractions,
    columns=fractions,
    pattern=st.sampled_from([*PATTERNS, "grid"]),
    spare=st.integers(0, 5),
    behind=st.integers(0, 4),
    norm=st.booleans(),
    kinds=others,
)
def test_a_layout_equals_the_reference(
    layout: tuple[Tensor, Tensor],
    keep: Fraction,
    columns: Fraction,
    pattern: str,
    spare: int,
    behind: int,
    norm: bool,
    kinds: list[tuple[torch.dtype, tuple[int, ...], str]],
) -> None:
    """Movement and metadata; what num_tokens has to spare is zeros, rows behind are not read."""
    cu_seqlens, spans = layout
    grid = pattern == "grid"
    arguments = (cu_seqlens, spans, (keep, columns) if grid else keep, pattern, 6 if grid else None)
    metadata = ops.rebuild_metadata(*arguments)
    total, rows = int(metadata.num_tokens), int(cu_seqlens[-1]) + behind
    inputs = drawn(rows, 16) if norm else {"hidden": drawn(rows, 16)["hidden"]}
    inputs["hidden"][rows - behind :] = torch.nan
    rest = moved(rows, kinds)
    out = ops.boundary_step(
        **inputs, others=rest, layout=ops.Layout(*arguments, num_tokens=total + spare)
    )
    with backend("reference"):
        same_step(
            out,
            ops.boundary_step(
                **inputs, others=rest, layout=ops.Layout(*arguments, num_tokens=total + spare)
            ),
        )
    assert out.metadata is not None
    assert all(torch.equal(x, y) for x, y in zip(out.metadata, metadata, strict=True))
    stage = metadata.stage(total, rows)
    same = ops.boundary_step(**inputs, others=rest, stage=stage)
    assert same_bits(out.hidden[:total], same.hidden)
    for x in (out.hidden, *([] if out.residual is None else [out.residual]), *out.others):
        assert x.shape[0] == total + spare
        assert not x[total:].contiguous().unsqueeze(-1).view(torch.uint8).any()


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_zeros_stay_zeros_with_any_weight(eps: float) -> None:
    inputs = drawn(4, 8)
    inputs["weight"][:] = torch.inf
    layout = ops.Layout(int32([0, 4], 2), int32([], 0, 3), 1, num_tokens=6)
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

STAGE = stage_of([[0, 0, 2, 2, 0, 0], [2, 2, 5, 3, 0, 1]], 5, 7)
CU, SPANS = int32([0, 7], 2), int32([[0, 2, 5]], 1, 3)
LAYOUT = ops.Layout(CU, SPANS, "1/2", num_tokens=7)  # two rows to spare


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
H, R, W = (drawn(7, 4)[name] for name in ("hidden", "residual", "weight"))
P = torch.arange(7)
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
        layout = ops.Layout(cu_seqlens, spans, "1/2", num_tokens=hidden.shape[0])
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


def call(hidden: object = H, **options: object) -> Callable[..., object]:
    if not options.keys() & {"stage", "keep_indices", "layout"}:
        options["stage"] = STAGE
    return lambda: ops.boundary_step(hidden, **options)  # type: ignore[arg-type]


E4M3 = H.to(torch.float8_e4m3fn)
BAD_CALLS = {
    "residual alone": (call(residual=R), ValueError, "^residual, weight: .*only residual"),
    "weight alone": (call(weight=W), ValueError, "^residual, weight: .*only weight"),
    "no source": (lambda: ops.boundary_step(H), ValueError, "^stage, keep_indices: .*neither"),
    "two sources": (call(stage=STAGE, keep_indices=P), ValueError, "^stage, keep_indices: .*both"),
    "layout and stage": (call(stage=STAGE, layout=LAYOUT), ValueError, "^stage, keep_indices, layout: .*layout and stage"),
    "layout and indices": (call(keep_indices=P, layout=LAYOUT), ValueError, ".*layout and keep_indices"),
    "hidden not a tensor": (call(1.0), TypeError, "^hidden: .*float"),
    "hidden strides": (call(torch.zeros(4, 7).T), ValueError, "^hidden: .*contiguous inside"),
    "hidden fp8": (call(E4M3, residual=E4M3, weight=W), TypeError, "^hidden: .*got torch.float8_e4m3fn"),
    "hidden rows": (call(H[:6]), ValueError, "^hidden: expected 7 rows"),
    "residual shape": (call(residual=R[:, :3].clone(), weight=W), ValueError, r"^residual: .*\(7, 4\), got \(7, 3\)"),
    "residual dtype": (call(residual=R.double(), weight=W), TypeError, "^residual: .*dtype of hidden"),
    "weight length": (call(residual=R, weight=W[:3].clone()), ValueError, r"^weight: .*\(4,\), got \(3,\)"),
    "eps": (call(residual=R, weight=W, eps=-1.0), ValueError, "^eps: .*-1"),
    "others rows": (call(others=[P, P[:6]]), ValueError, r"^others\[1\]: expected 7 rows, as hidden, got 6"),
    "others device": (call(others=[P.to("meta")]), ValueError, r"^others\[0\]: .*cpu, got meta"),
    "others scalar": (call(others=[torch.tensor(1)]), ValueError, r"^others\[0\]: .*dimension"),
    "table": (call(stage=stage_of([[0, 3, 5, 5, 0, 0]], 5, 7)), ValueError, "^segments: row 0"),
    "indices": (call(keep_indices=P + 1), ValueError, "^keep_indices: .*got 7 at position 6"),
    "layout type": (call(layout=(CU, SPANS)), TypeError, "^layout: expected a Layout, got tuple"),
    "num_tokens type": (call(layout=replace(LAYOUT, num_tokens=5.0)), TypeError, "^layout.num_tokens: .*float"),
    "num_tokens negative": (call(layout=replace(LAYOUT, num_tokens=-1)), ValueError, "^layout.num_tokens: .*-1"),
    "num_tokens too small": (call(layout=replace(LAYOUT, num_tokens=4)), ValueError, "^num_tokens: .*the stage, 5, got 4"),
    "cu_seqlens past hidden": (call(H[:6], layout=LAYOUT), ValueError, "^cu_seqlens: .*rows of hidden, 6, got 7"),
    "cu_seqlens device": (call(H.to("meta"), layout=LAYOUT), ValueError, "^cu_seqlens: .*meta, got cpu"),
    "spans": (call(layout=replace(LAYOUT, spans=int32([[0, 3, 5]], 1, 3))), ValueError, "^spans: row 0"),
    "keep": (call(layout=replace(LAYOUT, keep="3/2")), ValueError, "^keep: "),
    "pattern": (call(layout=replace(LAYOUT, pattern="random")), ValueError, "^pattern: .*'random'"),
}  # fmt: skip


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
        with pytest.raises(ValueError, match=message):
            OP(*arguments)
