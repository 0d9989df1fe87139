"""The compaction ops in Triton against the reference: every byte, and every output."""

import torch
from cases.compact import Case, check, dense_cases, paged_cases
from cases.run import on
from hypothesis import given, settings

from adsc_kernels.backend import backend, resolve


def test_triton_serves() -> None:
    with backend("triton"):
        assert resolve(torch.device("cpu")) == "triton"


@settings(max_examples=40, deadline=None)
@given(case=dense_cases())
def test_dense(case: Case) -> None:
    check(case, on("triton"))


@settings(max_examples=40, deadline=None)
@given(case=paged_cases())
def test_paged(case: Case) -> None:
    check(case, on("triton"))
