"""Every op of the token path against the reference on the CPU, over drawn movements.

Inputs lie in buffers of sentinels, at any offset, with any distance between rows; the whole buffer
is compared afterwards. Outputs come from memory that held sentinels.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate

import torch
from cases.plans import layouts, shares
from cases.row_bits import DTYPES, TRAILING, same_bits
from cases.segment_tables import FakeStage, by_stage, image_stage, stage_of, stages
from forms import each_form
from gpu_device import DEVICE, DRY_RUN, Framed, on_device, poison, to_device
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels import CompressionSchedule, backend, make_plan, ops, reference
from adsc_kernels.ops.rebuild_metadata import as_ints

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PATTERNS = ["start", "center", "linspace"]
# Widths around what a thread, a warp and a block take at once.
WIDTHS = [1, 2, 7, 8, 64, 127, 128, 513, 1024, 4096, 5120]
offsets = st.sampled_from([0, 0, 1, 2, 3, 4, 8])
gaps = st.sampled_from([0, 0, 1, 3, 8, 16])

SOME = image_stage(2, text=5, vision=24, kept=7)
# No rows at all; rows of which none stays; spans in the other two patterns, one begun before.
STAGES = [
    stage_of([], 0, 0),
    stage_of([[0, 0, 9, 0, 0, 0]], 0, 9),
    stage_of([[0, 0, 30, 7, 0, 1], [7, 30, 9, 9, 0, 0], [16, 22, 30, 8, 4, 2]], 20, 52),
]
# cu_seqlens, and the spans of pictures: b, start, length, height, width.
LAYOUT = ([0, 30, 30, 75], [(0, 3, 20, 4, 5), (2, 0, 12, 3, 4), (2, 13, 30, 5, 6)])
LAYOUTS = [([0], []), ([0, 0], []), ([0, 7], []), ([0, 20], [(0, 0, 20, 4, 5)])]
QUARTER, SHARES = Fraction(1, 4), [Fraction(0), Fraction(1), Fraction(2, 7)]
KINDS = [(i, i % 3, i % 5) for i in range(9)]  # number of the dtype, gap, offset


def indices_of(stage: FakeStage, width: torch.dtype) -> Tensor:
    return on_device(reference.source_rows(*by_stage(stage)), width)


@given(
    stage=stages(),
    dtype=st.sampled_from(DTYPES),
    trailing=st.sampled_from([*TRAILING, (64,), (512,), (4096,)]),
    gap=gaps,
    offset=offsets,
    expanded=st.booleans(),
    seed=st.integers(0, 2**31),
)
@each_form(
    {
        "stage": SOME,
        "dtype": torch.bfloat16,
        "trailing": (64,),
        "gap": 0,
        "offset": 0,
        "expanded": False,
        "seed": 0,
    },
    stage=STAGES,
    dtype=DTYPES,
    trailing=[*TRAILING, (4096,)],
    gap=[1, 8],
    offset=[1, 8],
    expanded=[True],
)
@each_form(
    {
        "stage": STAGES[0],
        "dtype": torch.bool,
        "trailing": (),
        "gap": 0,
        "offset": 0,
        "expanded": True,
        "seed": 0,
    },
    trailing=[(0,), (2, 3)],
)
def test_downsample(
    stage: FakeStage,
    dtype: torch.dtype,
    trailing: tuple[int, ...],
    gap: int,
    offset: int,
    expanded: bool,
    seed: int,
) -> None:
    width = torch.Size(trailing).numel()
    gap = -width if expanded else gap
    x = Framed(stage.num_tokens_in, trailing, dtype, gap=gap, offset=offset, seed=seed)
    wanted = reference.downsample(x.host, *by_stage(stage))
    poison(wanted.nbytes)
    out = ops.downsample(x.rows, to_device(stage))
    assert out.is_contiguous() and out.device.type == DEVICE.type
    assert same_bits(out.cpu(), wanted)
    for width_of_index in (torch.int32, torch.int64):
        poison(wanted.nbytes)
        rows = indices_of(stage, width_of_index)
        assert same_bits(ops.downsample(x.rows, keep_indices=rows).cpu(), wanted)
    assert x.unchanged()


@given(
    stage=stages(),
    kinds=st.lists(
        st.tuples(st.integers(0, len(DTYPES) - 1), gaps, offsets), min_size=1, max_size=9
    ),
)
@each_form(
    {"stage": SOME, "kinds": KINDS},
    stage=STAGES,
    kinds=[[(number, 0, 0)] for number in range(len(DTYPES))],
)
def test_downsample_many(stage: FakeStage, kinds: list[tuple[int, int, int]]) -> None:
    xs = [
        Framed(stage.num_tokens_in, TRAILING[i], DTYPES[number], gap=gap, offset=offset, seed=i)
        for i, (number, gap, offset) in enumerate(kinds)
    ]
    wanted = reference.downsample_many([x.host for x in xs], *by_stage(stage))
    poison(*(out.nbytes for out in wanted))
    outs = ops.downsample_many([x.rows for x in xs], to_device(stage))
    again = ops.downsample_many([x.rows for x in xs], keep_indices=indices_of(stage, torch.int64))
    for x, out, other, truth in zip(xs, outs, again, wanted, strict=True):
        assert same_bits(out.cpu(), truth)
        assert same_bits(other.cpu(), truth)
        assert x.unchanged()


@given(
    stage=stages(),
    dtype=st.sampled_from([*FLOATS, torch.complex64]),
    trailing=st.sampled_from(TRAILING),
    seed=st.integers(0, 100),
)
@each_form(
    {"stage": SOME, "dtype": torch.float32, "trailing": (33,), "seed": 0},
    stage=STAGES,
    dtype=[*FLOATS[1:], torch.complex64],
    trailing=TRAILING,
)
def test_upsample_grad(
    stage: FakeStage, dtype: torch.dtype, trailing: tuple[int, ...], seed: int
) -> None:
    """Dropped rows are exactly 0, and the others their output row's gradient, bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(stage.num_tokens, *trailing, generator=generator).to(dtype)
    x = torch.zeros(stage.num_tokens_in, *trailing, dtype=dtype, device=DEVICE, requires_grad=True)
    poison(x.nbytes)
    ops.downsample(x, to_device(stage)).backward(grad.to(DEVICE))
    wanted = torch.zeros(x.shape, dtype=dtype)
    wanted[reference.source_rows(*by_stage(stage))] = grad
    assert x.grad is not None
    assert torch.equal(x.grad.cpu(), wanted)


def normal(rows: int, hidden: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, hidden, generator=generator).to(dtype)


@given(
    stage=stages(),
    hidden=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(FLOATS),
    gap=gaps,
    offset=offsets,
)
@each_form(
    {"stage": SOME, "hidden": 4096, "dtype": torch.bfloat16, "gap": 0, "offset": 0},
    stage=STAGES,
    hidden=WIDTHS,
    dtype=FLOATS,
    gap=[3, 8],
    offset=[1, 4],
)
def test_downsample_add_rms_norm(
    stage: FakeStage, hidden: int, dtype: torch.dtype, gap: int, offset: int
) -> None:
    rows = stage.num_tokens_in
    x, residual = (
        Framed(
            rows,
            (hidden,),
            dtype,
            gap=gap,
            offset=offset + i,
            values=normal(rows, hidden, dtype, i),
        )
        for i in range(2)
    )
    weight = Framed(1, (hidden,), dtype, offset=offset, values=normal(1, hidden, dtype, 2))
    wanted = reference.downsample_add_rms_norm(
        x.host, residual.host, weight.host[0], *by_stage(stage), 1e-5
    )
    poison(*(out.nbytes for out in wanted))
    arguments = (x.rows, residual.rows, weight.rows[0])
    for where in (
        {"stage": to_device(stage)},
        {"keep_indices": indices_of(stage, torch.int32)},
        {"keep_indices": indices_of(stage, torch.int64)},
    ):
        normed, summed = ops.downsample_add_rms_norm(*arguments, eps=1e-5, **where)
        assert same_bits(summed.cpu(), wanted[1])
        torch.testing.assert_close(normed.cpu(), wanted[0])  # the error itself: test_norm_error
    assert x.unchanged() and residual.unchanged() and weight.unchanged()


def check_step(got: ops.BoundaryStep, wanted: ops.BoundaryStep) -> None:
    """The norm nearly, all else bit for bit."""
    hidden, residual, others, metadata = wanted
    if residual is None:
        assert got.residual is None
        assert same_bits(got.hidden.cpu(), hidden)
    else:
        torch.testing.assert_close(got.hidden.cpu(), hidden)
        assert same_bits(got.residual.cpu(), residual)
    for mine, truth in zip(got.others, others, strict=True):
        assert same_bits(mine.cpu(), truth)
    assert (got.metadata is None) == (metadata is None)
    if metadata is not None:
        same_metadata(got.metadata, metadata)


def step_inputs(
    rows: int, hidden: int, dtype: torch.dtype, kinds: list[tuple[int, int, int]]
) -> tuple[list[Framed], list[Framed]]:
    """hidden, residual and weight, and the other tensors."""
    floats = [
        Framed(n, (hidden,), dtype, gap=gap, offset=i, values=normal(n, hidden, dtype, i))
        for i, (n, gap) in enumerate([(rows, 8), (rows, 0), (1, 0)])
    ]
    others = [
        Framed(rows, TRAILING[i], DTYPES[number], gap=gap, offset=offset, seed=i)
        for i, (number, gap, offset) in enumerate(kinds)
    ]
    return floats, others


kinds_of_others = st.lists(
    st.tuples(st.integers(0, len(DTYPES) - 1), gaps, offsets), max_size=len(TRAILING)
)


@given(
    stage=stages(),
    hidden=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(FLOATS),
    norm=st.booleans(),
    kinds=kinds_of_others,
)
@each_form(
    {"stage": SOME, "hidden": 4096, "dtype": torch.bfloat16, "norm": True, "kinds": KINDS[:3]},
    stage=STAGES,
    hidden=WIDTHS,
    dtype=FLOATS,
    norm=[False],
    kinds=[[], KINDS],
)
def test_boundary_step(
    stage: FakeStage,
    hidden: int,
    dtype: torch.dtype,
    norm: bool,
    kinds: list[tuple[int, int, int]],
) -> None:
    (x, residual, weight), others = step_inputs(stage.num_tokens_in, hidden, dtype, kinds)
    there = {"residual": residual.host, "weight": weight.host[0]} if norm else {}
    here = {"residual": residual.rows, "weight": weight.rows[0]} if norm else {}
    with backend("reference"):
        wanted = ops.boundary_step(x.host, stage, others=[o.host for o in others], **there)
    moved = [other.rows for other in others]
    check_step(ops.boundary_step(x.rows, to_device(stage), others=moved, **here), wanted)
    for width in (torch.int32, torch.int64):
        rows = indices_of(stage, width)
        check_step(ops.boundary_step(x.rows, keep_indices=rows, others=moved, **here), wanted)
    assert all(framed.unchanged() for framed in (x, residual, weight, *others))


@given(
    layout=layouts(grid=True, max_sequences=9),
    keeps=st.tuples(shares, shares),
    pattern=st.sampled_from([*PATTERNS, "grid"]),
    hidden=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(FLOATS),
    norm=st.booleans(),
    kinds=kinds_of_others,
    spare=st.integers(0, 20),
    behind=st.integers(0, 5),
)
@each_form(
    {
        "layout": LAYOUT,
        "keeps": (QUARTER, QUARTER),
        "pattern": "start",
        "hidden": 64,
        "dtype": torch.bfloat16,
        "norm": True,
        "kinds": KINDS[:3],
        "spare": 0,
        "behind": 0,
    },
    layout=LAYOUTS,
    keeps=[(share, share) for share in SHARES],
    pattern=[*PATTERNS[1:], "grid"],
    hidden=WIDTHS,
    dtype=FLOATS,
    norm=[False],
    kinds=[[], KINDS],
    spare=[9],
    behind=[4],
)
def test_boundary_step_over_a_layout(
    layout: tuple[list[int], list[tuple[int, ...]]],
    keeps: tuple[Fraction, Fraction],
    pattern: str,
    hidden: int,
    dtype: torch.dtype,
    norm: bool,
    kinds: list[tuple[int, int, int]],
    spare: int,
    behind: int,
) -> None:
    """With room for more rows than the stage has, and rows that no sequence has."""
    bounds = torch.tensor(layout[0]).int()
    spans = torch.tensor([(b, s, h * w, h, w) for b, s, _, h, w in layout[1]]).int().reshape(-1, 5)
    keep, height = (keeps, 6) if pattern == "grid" else (keeps[0], None)
    parts = as_ints(list(keeps) if pattern == "grid" else [keep])
    total = int(reference.rebuild_metadata(bounds, spans, parts, pattern, height or 0)[4])
    rows = layout[0][-1] + behind
    (x, residual, weight), others = step_inputs(rows, hidden, dtype, kinds)
    there = {"residual": residual.host, "weight": weight.host[0]} if norm else {}
    here = {"residual": residual.rows, "weight": weight.rows[0]} if norm else {}
    room = {"num_tokens": total + spare}
    with backend("reference"):
        wanted = ops.boundary_step(
            x.host,
            layout=ops.BatchLayout(bounds, spans, keep, pattern, height, **room),
            others=[other.host for other in others],
            **there,
        )
    got = ops.boundary_step(
        x.rows,
        layout=ops.BatchLayout(bounds.to(DEVICE), spans.to(DEVICE), keep, pattern, height, **room),
        others=[other.rows for other in others],
        **here,
    )
    check_step(got, wanted)
    assert all(framed.unchanged() for framed in (x, residual, weight, *others))


def same_metadata(got: ops.Metadata, wanted: tuple[Tensor, ...]) -> None:
    for name, mine, truth in zip(got._fields, got, wanted, strict=True):
        assert same_bits(mine.cpu(), truth), name


@given(layout=layouts(grid=False, max_sequences=9), keep=shares, pattern=st.sampled_from(PATTERNS))
@each_form(
    {"layout": LAYOUT, "keep": QUARTER, "pattern": "start"},
    layout=LAYOUTS,
    keep=SHARES,
    pattern=PATTERNS[1:],
)
def test_rebuild_metadata(
    layout: tuple[list[int], list[tuple[int, ...]]], keep: Fraction, pattern: str
) -> None:
    bounds = torch.tensor(layout[0]).int()
    spans = torch.tensor([span[:3] for span in layout[1]]).int().reshape(-1, 3)
    wanted = reference.rebuild_metadata(bounds, spans, as_ints([keep]), pattern, 0)
    poison(*(out.nbytes for out in wanted))
    got = ops.rebuild_metadata(bounds.to(DEVICE), spans.to(DEVICE), keep, pattern)
    same_metadata(got, wanted)


@given(layout=layouts(grid=True, max_sequences=9), rows=shares, columns=shares)
@each_form({"layout": LAYOUT, "rows": QUARTER, "columns": QUARTER}, layout=LAYOUTS, rows=SHARES)
def test_rebuild_metadata_of_a_grid(
    layout: tuple[list[int], list[tuple[int, ...]]], rows: Fraction, columns: Fraction
) -> None:
    bounds = torch.tensor(layout[0]).int()
    spans = torch.tensor([(b, s, h * w, h, w) for b, s, _, h, w in layout[1]]).int().reshape(-1, 5)
    wanted = reference.rebuild_metadata(bounds, spans, as_ints([rows, columns]), "grid", 6)
    got = ops.rebuild_metadata(bounds.to(DEVICE), spans.to(DEVICE), (rows, columns), "grid", 6)
    same_metadata(got, wanted)


def test_thousands_of_sequences() -> None:
    """Beside the planner: the reference looks at every span for every sequence."""
    count = 50 if DRY_RUN else 5000
    generator = torch.Generator().manual_seed(0)
    before, length, after = torch.randint(0, 40, (3, count), generator=generator).tolist()
    bounds = [0, *accumulate(map(sum, zip(before, length, after, strict=True)))]
    spans = list(zip(range(count), before, length, strict=True))
    for pattern in PATTERNS:
        schedule = CompressionSchedule.parse(f"1:2/7@{pattern}", num_layers=2)
        stage = make_plan(schedule, bounds, spans).stages[1]
        got = ops.rebuild_metadata(on_device(bounds), on_device(spans), "2/7", pattern)
        assert torch.equal(got.cu_seqlens.cpu(), stage.cu_seqlens)
        assert tuple(got.seq_lens.tolist()) == stage.seq_lens
        assert (int(got.num_tokens), int(got.max_seqlen)) == (stage.num_tokens, stage.max_seqlen)
        rows = torch.arange(bounds[-1], device=DEVICE)
        moved = ops.downsample(rows, got.stage(stage.num_tokens, stage.num_tokens_in))
        assert torch.equal(moved.cpu(), stage.keep_indices())
