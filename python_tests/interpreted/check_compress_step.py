"""compress_step on the Triton backend: rows and caches, every byte; the op's own checks."""

import pytest
import torch
from cases.compact import Case, dense_cases, on_device, paged_cases
from cases.compress_step import Rows, boundaries, run, same_boundary
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compact_kernels import check_buffers, check_results
from test_compress_step import sample
from torch.library import opcheck

from adsc_kernels.backend import backend

OP = torch.ops.adsc_triton.compress_step.default


@settings(max_examples=30, deadline=None)
@given(case=st.one_of(dense_cases(), paged_cases()), rows=boundaries(max_length=12))
def test_equals_the_reference(case: Case, rows: Rows) -> None:
    built, wanted = case.build(), case.build()
    with backend("triton"):
        step = run(case, built, rows, on_device(built.arguments))
    with backend("reference"):
        truth = run(case, wanted, rows)
    check_results(step.compaction, truth.compaction)
    check_buffers(built, wanted)
    same_boundary(step.boundary, truth.boundary, exact=False)


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
