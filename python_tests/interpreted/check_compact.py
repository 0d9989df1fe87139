"""The compaction ops in Triton against the reference: every byte, and every output."""

import torch
from cases.compact import Case, check, dense_cases, paged_cases
from cases.run import on
from hypothesis import given, settings

from adsc_kernels import ops
from adsc_kernels.backend import backend, resolve


def test_triton_serves() -> None:
    with backend("triton"):
        assert resolve(torch.device("cpu")) == "triton"


@settings(max_examples=20, deadline=None)
@given(case=dense_cases())
def test_dense(case: Case) -> None:
    check(case, on("triton"))


@settings(max_examples=20, deadline=None)
@given(case=paged_cases())
def test_paged(case: Case) -> None:
    check(case, on("triton"))


def test_a_page_longer_than_a_tile_whose_rows_move_to_later_places() -> None:
    """Rows 1, 3, ... 399 of two blocks of 200 go to the second block, which the last lies in."""
    rows = torch.arange(1, 400, 2)
    found, wanted = (torch.arange(400).view(2, 200, 1, 1) for _ in range(2))
    results = [
        on(name)(
            ops.compact_paged_kv_,
            pool,
            None,
            torch.tensor([[0, 1]]),
            keep_indices=rows,
            cu_kept=[0, 200],
            seq_lens=[400],
            edit_table=True,
        )
        for name, pool in (("triton", found), ("reference", wanted))
    ]
    assert found[1].flatten().tolist() == rows.tolist()
    assert torch.equal(found, wanted)
    for result in results:
        assert result.block_table.tolist() == [[1, -1]]
