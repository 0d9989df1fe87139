"""compress_step on the Triton backend: rows and caches, every byte; the op's own checks."""

import pytest
import torch
from cases.boundary_step import Rows, boundaries
from cases.compact import Case
from cases.compress_step import caches, check, sample
from cases.run import on
from hypothesis import given, settings
from torch.library import opcheck

OP = torch.ops.adsc_triton.compress_step.default


@settings(max_examples=30, deadline=None)
@given(case=caches, rows=boundaries(max_length=12, widths=[1, 7, 8, 64, 520]))
def test_equals_the_reference(case: Case, rows: Rows) -> None:
    check(case, rows, on("triton"))


@pytest.mark.parametrize("kind", ["dense", "paged", "layout"])
def test_opcheck(kind: str) -> None:
    opcheck(OP, sample(kind))


def test_outputs_of_another_shape() -> None:
    arguments = list(sample("dense"))
    cache = arguments[13][0]
    before = cache.clone()
    for outs, message in (([], "^outs: .*2 tensors"), (arguments[-1][::-1], r"^outs\[0\]: ")):
        with pytest.raises(ValueError, match=message):
            OP(*arguments[:-1], outs)
    assert torch.equal(cache, before)
