"""boundary_step in Triton against the reference, from a table, a list and a layout."""

import torch
from cases.boundary_step import Rows, boundaries, check, others_of
from cases.rebuild_metadata import int32
from cases.run import on
from hypothesis import given, settings
from torch import Tensor

from adsc_kernels import ops

# Each tile of a row is a program, and programs are interpreted one after another.
NARROW = {"widths": [0, 3, 16, 40], "kinds": others_of([(), (3,)], 2)}


def near(got: Tensor, wanted: Tensor) -> None:
    """Nearer than assert_close takes bfloat16, and also next to zero."""
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(got, wanted, rtol=2**-7, atol=1e-30)


@settings(max_examples=12, deadline=None)
@given(boundaries(max_length=12, forms=("stage",), **NARROW))
def test_of_a_stage(rows: Rows) -> None:
    check(rows, on("triton"), near)


@settings(max_examples=12, deadline=None)
@given(boundaries(max_length=12, forms=("keep_indices",), **NARROW))
def test_of_indices(rows: Rows) -> None:
    check(rows, on("triton"), near)


@settings(max_examples=15, deadline=None)
@given(boundaries(forms=("layout",), **NARROW | {"widths": [3, 8]}))
def test_of_a_layout(rows: Rows) -> None:
    check(rows, on("triton"), near)


def test_more_spans_than_are_looked_at_together() -> None:
    spans = int32([[0, 3 * i, 3 - i % 2] for i in range(150)], 150, 3)
    layout = ops.BatchLayout(int32([0, 460], 2), spans, "1/3", num_tokens=460)
    out = check(Rows({"hidden": torch.arange(460), "layout": layout}, norm=False), on("triton"))
    assert out.metadata is not None
    assert not out.hidden[int(out.metadata.num_tokens) :].any()
