"""compress_step on the Triton backend: rows and caches, every byte; the op's own checks."""

import pytest
import torch
from cases.boundary_step import Rows, boundaries, others_of
from cases.compact import Case
from cases.compress_step import HIDDEN, S, caches, check, sample
from cases.run import on
from hypothesis import given, settings
from torch.library import opcheck

from adsc_kernels import ops
from adsc_kernels.backend import backend

OP = torch.ops.adsc_triton.compress_step.default


@settings(max_examples=15, deadline=None)
@given(
    case=caches,
    rows=boundaries(max_length=12, widths=[1, 7, 8, 64, 520], kinds=others_of(max_size=3)),
)
def test_equals_the_reference(case: Case, rows: Rows) -> None:
    check(case, rows, on("triton"))


@pytest.mark.parametrize("kind", ["dense", "paged", "layout"])
def test_opcheck(kind: str) -> None:
    opcheck(OP, sample(kind))


def test_what_is_wrong_with_the_rows_is_an_error_before_a_cache_is_written() -> None:
    cache = torch.randn(S.num_tokens_in, 2, 3)
    before = cache.clone()
    with backend("triton"), pytest.raises(ValueError, match=r"^others\[0\]: .*22 rows"):
        ops.compress_step(HIDDEN, ops.DenseCache([cache], None), S, others=[HIDDEN[1:]])
    assert torch.equal(cache, before)
