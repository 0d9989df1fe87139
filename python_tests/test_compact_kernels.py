"""The compaction kernels against the reference: every byte of every buffer, and every output."""

from __future__ import annotations

from typing import Any

import torch
from cache_cases import Built, Case, dense_cases, on_device, paged_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from adsc_kernels import backend, ops
from adsc_kernels.compaction import CompactionResult


def check_same(case: Case, op: Any, name: str, uploaded: bool) -> None:
    """`name` does to a whole cache what the reference does."""
    wanted, got = case.build(), case.build()
    with backend("reference"):
        wanted_result = op(**wanted.arguments)
    arguments = on_device(got.arguments) if uploaded else got.arguments
    with backend(name):
        result = op(**arguments)
    check_buffers(got, wanted)
    check_results(result, wanted_result)


def check_buffers(got: Built, wanted: Built) -> None:
    for i, (a, b) in enumerate(zip(got.buffers, wanted.buffers, strict=True)):
        if not torch.equal(a, b):
            at = int((a != b).nonzero()[0])
            raise AssertionError(f"buffer {i}: byte {at} of {a.numel()} is {a[at]}, not {b[at]}")


def check_results(got: CompactionResult, wanted: CompactionResult) -> None:
    assert got.seq_lens.host == wanted.seq_lens.host
    for name in ("slot_mapping", "block_table", "last_page_len", "indptr"):
        a, b = getattr(got, name), getattr(wanted, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name
    assert torch.equal(got.seq_lens.device, wanted.seq_lens.device)


@settings(max_examples=300, deadline=None)
@given(case=dense_cases(), uploaded=st.booleans())
def test_cpu_dense(case: Case, uploaded: bool) -> None:
    check_same(case, ops.compact_kv_, "cpu", uploaded)


@settings(max_examples=300, deadline=None)
@given(case=paged_cases(), uploaded=st.booleans())
def test_cpu_paged(case: Case, uploaded: bool) -> None:
    check_same(case, ops.compact_paged_kv_, "cpu", uploaded)
