"""What the compaction ops refuse, before anything is written; opcheck, torch.compile."""
# ruff: noqa: E501 (tables of cases, one a line)

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.refused import BY_THE_OP
from cases.refused.compact import BAD_CALLS, BAD_OBJECTS, INDICES, STAGE, TABLE, table_with
from torch import Tensor
from torch.library import opcheck

from adsc_kernels import ops


@pytest.mark.parametrize("name", [*BAD_CALLS, *BAD_OBJECTS])
def test_bad_input(name: str) -> None:
    call, error, message = (BAD_CALLS | BAD_OBJECTS)[name]
    with pytest.raises(error, match=message):
        call()


def test_a_cache_and_words_for_what_it_leaves_open() -> None:
    """A call with an object does what the same call in words does, wherever a thing is said."""
    pools = [torch.randn(9, 3, 4, 5) for _ in range(3)]  # HND
    saved, scales = [x.clone() for x in pools], torch.randn(9, 3, 4)
    wanted = ops.compact_paged_kv_(
        pools, None, TABLE, STAGE, layout="HND", k_scales=[scales, scales.clone(), scales + 1],
        edit_table=True, read_only_blocks=[0],
    )  # fmt: skip
    moved = [x.clone() for x in pools]
    assert not all(map(torch.equal, moved, saved))
    for said in ((), ("stage",), ("stage", "edit_table", "read_only_blocks", "k_scales")):
        every = {
            "stage": STAGE,
            "edit_table": True,
            "read_only_blocks": [0],
            "k_scales": [scales.clone() for _ in range(3)],
        }
        for x, before in zip(pools, saved, strict=True):
            x.copy_(before)
        own = {name: value for name, value in every.items() if name in said}
        rest = {name: value for name, value in every.items() if name not in said}
        cache = ops.PagedCache(pools, None, TABLE, layout="HND", **own)
        result = ops.compact_paged_kv_(cache, **rest)
        assert all(map(torch.equal, pools, moved))
        assert torch.equal(result.block_table, wanted.block_table)
        assert (cache.stage is None) == ("stage" not in said)  # the object stays as it was


def test_nothing_is_written_by_a_call_that_raises() -> None:
    k = torch.randn(9, 4, 3, 5)
    before = k.clone()
    for options in (
        {"read_only_blocks": [5]},
        {"block_table": table_with(9)},
        {"seq_lens": [16, 99]},
    ):
        with pytest.raises(ValueError, match=r"read_only_blocks|block_table|seq_lens"):
            ops.compact_paged_kv_(k, None, **{"block_table": TABLE, "stage": STAGE, **options})
        assert torch.equal(k, before)


def test_views_that_only_interleave_are_no_overlap() -> None:
    """K and V of one storage, in every place where engines put the axis between them."""
    for axis in range(3):
        both = torch.randn(*[(2, 9, 4, 3, 5), (9, 2, 4, 3, 5), (9, 4, 2, 3, 5)][axis])
        k, v = both.unbind(axis)
        ops.compact_paged_kv_(k, v, TABLE, STAGE)
    packed = torch.randn(9, 3, 4, 10)
    ops.compact_paged_kv_(packed[..., :6], packed[..., 6:], TABLE, STAGE, layout="HND")
    pool = torch.zeros(9, 4 * 3 * 5 * 2 + 16, dtype=torch.uint8)  # blocks of data, then scales
    k = pool.as_strided((9, 4, 3, 5), (136, 15, 5, 1))
    v = pool.as_strided((9, 4, 3, 5), (136, 15, 5, 1), 60)
    scales = pool.as_strided((9, 4), (136, 4), 120)
    ops.compact_paged_kv_(k, v, TABLE, STAGE, k_scales=scales)


def test_the_op_itself_checks_too() -> None:
    op = torch.ops.adsc_kernels.compact_paged_kv_
    k = torch.ones(9, 4, 3, 5)
    good = [
        [k],
        1,
        TABLE,
        4,
        STAGE.segments,
        None,
        STAGE.cu_seqlens,
        STAGE.cu_seqlens_in,
        None,
        None,
        False,
        None,
        "NHD",
    ]
    op(*good)
    for place, value, message in [
        (0, [], "^caches: "), (0, [torch.ones(2, 2)], r"^caches\[0\]: expected 3 or 4"), (1, 2, "^num_layers: "),
        (2, TABLE.float(), "^block_table: "), (2, table_with(9), "^block_table: .*got 9"), (3, 3, "^block_size: "),
        (4, None, "^segments, keep_indices: "), (4, STAGE.segments.long(), "^segments: "), (4, STAGE.segments[:0], "^segments: "),
        (5, INDICES[None, None], "^segments, keep_indices: .*both"), (6, INDICES[:0], "^cu_kept: "), (6, STAGE.cu_seqlens.float(), "^cu_kept: "),
        (7, None, "^cu_rows: "), (8, INDICES, "^prefix_lens: "), (9, torch.tensor([16, 17]), "^seq_lens: "), (9, torch.tensor([16, 1]), "^seq_lens: "),
        (2, table_with(1), "^block_table: .*block 1 2 times, again at "), (11, torch.tensor([1]), "^read_only_blocks: .*block 1, but sequence 0"), (11, TABLE, "^read_only_blocks: "),
        (12, "NHWC", "^cache_layout: "),
    ]:  # fmt: skip
        bad = list(good)
        bad[place] = value
        with pytest.raises(BY_THE_OP, match=message):
            op(*bad)


def sample(paged: bool, by_index: bool, edit: bool = False) -> tuple[Any, tuple[Any, ...]]:
    rows: tuple[Any, ...] = (
        STAGE.segments,
        None,
        STAGE.cu_seqlens,
        STAGE.cu_seqlens_in,
        None,
        None,
    )
    if by_index:
        lens = torch.tensor([16, 16])
        rows = (
            None,
            INDICES[None, None],
            torch.tensor([0, 2, 4]),
            None,
            torch.tensor([1, 0]),
            lens,
        )
    both = torch.randn(9, 2, 4, 3, 5)
    if paged:
        return torch.ops.adsc_kernels.compact_paged_kv_.default, (
            [both[:, 0], both[:, 1]],
            1,
            TABLE,
            4,
            *rows,
            edit,
            torch.tensor([8, 77]),
            "NHD",
        )
    caches = [torch.randn(2, 3, 20, 4), torch.randn(2, 3, 20, 4)]
    return torch.ops.adsc_kernels.compact_kv_.default, (caches, 1, *rows, None, "HND")


@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize("kind", ["dense", "paged", "edited"])
def test_opcheck(kind: str, by_index: bool) -> None:
    opcheck(*sample(kind != "dense", by_index, kind == "edited"))


def test_fullgraph() -> None:
    """Views of one storage, mutated in a compiled graph; results as without."""

    def run(both: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        result = ops.compact_paged_kv_(both[:, 0], both[:, 1], table, STAGE, edit_table=True)
        assert result.block_table is not None
        return both.sum(), result.seq_lens.device, result.block_table, result.slot_mapping

    both = torch.randn(9, 2, 4, 3, 5)
    other = both.clone()
    wanted = run(both, TABLE)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(other, TABLE)
    assert torch.equal(both, other)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_read_only_blocks_are_heeded_in_a_compiled_graph() -> None:
    """The host doesn't look at the table there; the op does."""

    def run(pool: Tensor, read_only_blocks: Tensor) -> Tensor:
        ops.compact_paged_kv_(pool, None, TABLE, STAGE, read_only_blocks=read_only_blocks)
        return pool.sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    pool = torch.randn(9, 4, 3, 5)
    before = pool.clone()
    with pytest.raises(BY_THE_OP, match=r"^read_only_blocks: .*block 1, but sequence 0"):
        compiled(pool, torch.tensor([1]))
    assert torch.equal(pool, before)
    compiled(pool, torch.tensor([0]))
    assert not torch.equal(pool, before)
