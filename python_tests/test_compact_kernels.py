"""The compaction kernels against the reference: every byte of every buffer, and every output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.compact import Blocks, Case, blocks, check, dense_cases, paged_cases
from cases.plans import image_plan
from cases.refused import BY_THE_OP
from cases.run import on
from hypothesis import given, settings
from hypothesis import strategies as st

from adsc_kernels import CompressionSchedule, backend, make_plan, ops, reference

CPU_OP = torch.ops.adsc_kernels.compact_paged_kv_


@settings(max_examples=300, deadline=None)
@given(case=dense_cases(), uploaded=st.booleans())
def test_cpu_dense(case: Case, uploaded: bool) -> None:
    check(case, on("cpu"), uploaded)


@settings(max_examples=300, deadline=None)
@given(case=paged_cases(), uploaded=st.booleans())
def test_cpu_paged(case: Case, uploaded: bool) -> None:
    check(case, on("cpu"), uploaded)


@settings(max_examples=200, deadline=None)
@given(drawn=blocks(outside=False))
def test_cpu_refuses_what_the_reference_refuses(drawn: Blocks) -> None:
    """Shared and read-only blocks, by the op itself; the reference looks at every row."""
    (wanted, arguments), (got, same) = drawn.build(), drawn.build()
    saved = [buffer.clone() for buffer in wanted]
    names = []
    for op, its in ((reference.compact_paged_kv_, arguments), (CPU_OP, same)):
        try:
            op(*its)
        except (ValueError, BY_THE_OP) as error:
            names.append(str(error).split(":")[0])
        else:
            names.append("")
    assert names[0] == names[1]
    assert all(map(torch.equal, got, wanted))
    if names[0]:
        assert all(map(torch.equal, got, saved))


LENGTHS = [1, 2, 31, 32, 33, 255, 256, 257]


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("vision", LENGTHS)
def test_lengths_around_tiles(vision: int, paged: bool) -> None:
    """Keep none, one, all but one, all; with a suffix shorter and longer than what is dropped."""
    for kept in {0, 1, vision // 2, vision - 1, vision}:
        for suffix in (0, 1, vision - kept, vision + 1):
            stage = image_plan(keep=f"{kept}/{vision}", text=3, vision=vision, tail=0)
            total = 3 + vision + suffix
            k = torch.arange(total * 4, dtype=torch.float32).reshape(1, total, 2, 2)
            rows = [0, 1, 2, *(3 + int(j) * vision // kept for j in range(kept))]
            wanted = k.clone()
            taken = k[:, rows + list(range(3 + vision, total))]
            wanted[:, : taken.shape[1]] = taken
            if paged:
                ops.compact_paged_kv_(
                    k[0], None, torch.arange(total)[None], stage, 1, seq_lens=[total]
                )
            else:
                ops.compact_kv_(k, None, stage, seq_lens=[total])
            assert torch.equal(k, wanted)


@pytest.mark.parametrize("pattern", ["start", "center", "linspace"])
@pytest.mark.parametrize("size", [16, 64, 512])
def test_aligned_pictures(size: int, pattern: str) -> None:
    """Pages in which a picture ends are moved backwards, also from a page into itself."""
    schedule = CompressionSchedule.parse(f"1:15/16@{pattern}", num_layers=2)
    for text in range(0, size, max(size // 8, 3)):
        total = text + 576 + 13 + 600 + 30
        spans = [(0, text, 576), (0, text + 589, 600)]
        stage = make_plan(schedule, [0, total], spans, block_size=size, align="block").stages[1]
        pages = -(-total // size)
        pool = torch.randint(0, 256, (pages, size, 2, 3), dtype=torch.uint8)
        table = torch.randperm(pages)[None]
        wanted = pool.clone()
        with backend("reference"):
            ops.compact_paged_kv_(wanted, None, table, stage, edit_table=True)
        ops.compact_paged_kv_(pool, None, table, stage, edit_table=True)
        assert torch.equal(pool, wanted)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_100k_tokens(layout: str, threads: int) -> None:
    """A long prompt of pictures, large enough for several threads, in both forms of rows."""
    schedule = CompressionSchedule.parse("1:1/9@center", num_layers=2)
    spans = [(0, 1000 * i + 7, 900) for i in range(100)]
    stage = make_plan(schedule, [0, 100_000], spans).stages[1]
    rows = torch.from_numpy(stage.source_rows())
    before = torch.randint(0, 256, (1, 100_000, 2, 16), dtype=torch.uint8)
    wanted = before.clone()
    wanted[0, : len(rows)] = before[0, rows]
    count = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for by_index in (False, True):
            k = before.clone() if layout == "NHD" else before.transpose(1, 2).clone()
            v = k.clone()
            if by_index:
                which: dict[str, Any] = {"keep_indices": rows, "cu_kept": [0, len(rows)]}
                ops.compact_kv_(k, v, layout=layout, seq_lens=[100_000], **which)
            else:
                ops.compact_kv_(k, v, stage, layout=layout)
            for x in (k, v):
                assert torch.equal(x if layout == "NHD" else x.transpose(1, 2), wanted)
    finally:
        torch.set_num_threads(count)
