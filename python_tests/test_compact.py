"""compact_kv_ and compact_paged_kv_: what they do to a cache, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.compact import Case, dense_cases, paged_cases
from cases.plans import image_plan
from cases.row_bits import bits
from hypothesis import given, settings
from torch import Tensor

from adsc_kernels import CompressionSchedule, backend, make_plan, ops

TENSORS = ("k_caches", "v_caches", "k_scales", "v_scales")


def logical(x: Tensor, layout: str, batched: bool) -> Tensor:
    """[B or slots, ...] with tokens in front of heads, as a copy."""
    first = 1 if batched else 0
    if layout == "HND" and x.dim() > first + 1:
        x = x.transpose(first, first + 1)
    return x.clone()


def sequence_of(case: Case, x: Tensor, b: int, table: Tensor | None, count: int) -> Tensor:
    """The first `count` rows of sequence b, packed."""
    if table is not None:
        size = case.extra["block_size"]
        rows = torch.arange(count)
        slots = table[b].long()[rows // size] * size + rows % size
        flat = logical(x, case.layout, case.blocks is not None)
        return (flat if case.blocks is None else flat.flatten(0, 1))[slots]
    if case.blocks is not None:
        return logical(x[b], case.layout, False)[:count]
    start = case.extra["seq_starts"][b]
    return logical(x, case.layout, False)[start : start + count]


def check_gathered(case: Case, op: Any, name: str) -> None:
    """The cache reads afterwards as the old one, gathered."""
    before, after = case.build(), case.build()
    with backend(name):
        result = op(**after.arguments)
    table, new_table = before.arguments.get("block_table"), result.block_table
    assert result.seq_lens.host == tuple(map(len, case.rows.old))
    assert result.seq_lens.device.tolist() == list(result.seq_lens.host)
    for key in TENSORS:
        pairs = zip(before.arguments.get(key) or [], after.arguments.get(key) or [], strict=True)
        for old, new in pairs:
            for b, rows in enumerate(case.rows.old):
                was = sequence_of(case, old, b, table, case.rows.seq_lens[b])
                now = sequence_of(case, new, b, new_table, len(rows))
                wanted = was[torch.tensor(rows, dtype=torch.int64)]
                assert torch.equal(bits(now), bits(wanted))


@settings(max_examples=100, deadline=None)
@given(case=dense_cases())
def test_reference_gathers_dense(case: Case) -> None:
    check_gathered(case, ops.compact_kv_, "reference")


@settings(max_examples=100, deadline=None)
@given(case=paged_cases())
def test_reference_gathers_paged(case: Case) -> None:
    check_gathered(case, ops.compact_paged_kv_, "reference")


@settings(max_examples=100, deadline=None)
@given(case=paged_cases())
def test_blocks(case: Case) -> None:
    """Blocks released and free, by sets; the tables of the result."""
    built = case.build()
    result = ops.compact_paged_kv_(**built.arguments)
    size = case.extra["block_size"]
    table, new_table = built.arguments["block_table"].tolist(), result.block_table.tolist()
    assert result.released_blocks is not None
    assert result.free_blocks is not None
    free, indptr = [], [0]
    for b, n in enumerate(case.rows.seq_lens):
        new = len(case.rows.old[b])
        pages = -(-new // size)
        used = new_table[b][:pages]
        released = [block for block in table[b][: -(-n // size)] if block not in used]
        assert result.released_blocks[b].tolist() == released
        free += released
        indptr.append(indptr[-1] + pages)
        assert result.last_page_len[b] == new - size * max(pages - 1, 0)
        slot = used[-1] * size + new % size if new % size else -1
        assert result.slot_mapping[b] == slot
        if case.extra["edit_table"]:
            assert new_table[b][pages:] == [-1] * (len(table[b]) - pages)
    assert result.free_blocks.tolist() == sorted(free)
    assert result.indptr.tolist() == indptr
    if not case.extra["edit_table"]:
        assert result.block_table is built.arguments["block_table"]


@settings(max_examples=25, deadline=None)
@given(case=paged_cases())
def test_read_only_blocks_that_would_change_are_refused_and_only_those(case: Case) -> None:
    """A block of the old cache is written exactly if pinning it raises."""
    case.extra["edit_table"] = not case.extra["edit_table"]
    before, after = case.build(), case.build()
    ops.compact_paged_kv_(**after.arguments)
    size = case.extra["block_size"]
    changed = set()
    for key in TENSORS:
        for old, new in zip(
            before.arguments.get(key) or [], after.arguments.get(key) or [], strict=True
        ):
            was = logical(old, case.layout, case.blocks is not None)
            now = logical(new, case.layout, case.blocks is not None)
            width = 1 if case.blocks is not None else size
            flat = (bits(was) != bits(now)).reshape(was.shape[0] // width, -1)
            changed |= set(flat.any(1).nonzero().flatten().tolist())
    for block in range(case.blocks or case.tokens // size):
        built = case.build()
        saved = [buffer.clone() for buffer in built.buffers]
        try:
            ops.compact_paged_kv_(**built.arguments, read_only_blocks=[block])
        except ValueError as error:
            assert f"into block {block}," in str(error)  # noqa: PT017
            assert all(map(torch.equal, built.buffers, saved))
        else:
            assert block not in changed


def test_an_aligned_suffix_stays_where_it_is() -> None:
    """64 -> 16 of blocks of 16: three blocks go, the text behind keeps its bytes and its blocks."""
    stage = image_plan(keep="1/4")
    pool = torch.arange(8 * 16 * 2.0).reshape(8, 16, 1, 2)
    before = pool.clone()
    table = torch.tensor([[7, 0, 6, 1, 5, 2, 4, 3]], dtype=torch.int32)
    result = ops.compact_paged_kv_(
        pool, None, table, stage, edit_table=True, read_only_blocks=[7, 0, 4, 3]
    )
    assert result.block_table.tolist() == [[7, 0, 6, 4, 3, -1, -1, -1]]
    assert result.free_blocks.tolist() == [1, 2, 5]
    changed = (pool != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == [6]
    assert torch.equal(pool[6], before[[6, 1, 5, 2]].reshape(64, 1, 2)[::4])


@pytest.mark.parametrize("size", [1, 2, 16, 64, 256])
@pytest.mark.parametrize("text", [0, 5, 35, 64])
@pytest.mark.parametrize("keep", ["0", "1/9", "1/4"])
def test_text_behind_an_aligned_picture_does_not_move(keep: str, text: int, size: int) -> None:
    """Two pictures: what is behind them keeps its slots, and what is between them where it ends a
    page, so that nothing but survivors moves, and text in a page whose end is another's."""
    schedule = CompressionSchedule.parse(f"1:{keep}", num_layers=2)
    spans = [(0, text, 576), (0, text + 576 + 90, 300)]
    total = text + 576 + 90 + 300 + 40
    plan = make_plan(schedule, [0, total], spans, block_size=size, align="block")
    stage, length = plan.stages[1], total + 13
    pages = -(-length // size)
    pool = torch.arange(pages * size, dtype=torch.float32).reshape(-1, size, 1, 1)
    before = pool.clone()
    table = torch.randperm(pages)[None]
    result = ops.compact_paged_kv_(pool, None, table, stage, seq_lens=[length], edit_table=True)
    assert result.block_table is not None
    sources = [*stage.source_rows().tolist(), *range(total, length)]
    pictures = {row for _, start, count in spans for row in range(start, start + count)}
    moved = 0
    for r, source in enumerate(sources):
        old = table[0, source // size] * size + source % size
        new = result.block_table[0, r // size] * size + r % size
        assert pool.flatten()[new] == before.flatten()[old]
        moved += int(old != new)
        end = min((r // size + 1) * size, len(sources)) - 1
        if source >= text and pictures.isdisjoint(range(source, sources[end] + 1)):
            assert old == new
    if (keep, text, size) == ("1/4", 35, 16):
        assert moved == 218  # of 144 + 76 survivors


def test_page_size_one_moves_nothing() -> None:
    stage = image_plan(2, keep="1/3")
    pool = torch.randn(300, 2, 4)
    before = pool.clone()
    table = torch.randperm(300)[: 2 * 128].reshape(2, 128)
    result = ops.compact_paged_kv_(
        pool, None, table, stage, 1, edit_table=True, read_only_blocks=table
    )
    assert torch.equal(pool, before)
    rows = torch.from_numpy(stage.source_rows()).reshape(2, -1)
    for b in range(2):
        kept = table[b][rows[b] - 128 * b]
        assert torch.equal(result.block_table[b, : kept.numel()], kept)


def test_shared_prefix() -> None:
    """Two sequences share their first blocks: named as read-only they stay; unnamed, an error."""
    stage = image_plan(2, keep="0", text=32, vision=16, tail=16)
    pool = torch.randn(6, 16, 1, 2)
    table = torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5]])
    with pytest.raises(
        ValueError, match=r"^block_table: .*named in read_only_blocks, got block 0 2 times"
    ):
        ops.compact_paged_kv_(pool, None, table, stage)
    result = ops.compact_paged_kv_(pool, None, table, stage, read_only_blocks=[0, 1])
    assert [b.tolist() for b in result.released_blocks or []] == [[3], [5]]
    assert result.free_blocks.tolist() == [3, 5]
    stage = image_plan(2, keep="0", text=0, vision=64, tail=0)
    result = ops.compact_paged_kv_(pool, None, table, stage, read_only_blocks=[0, 1])
    assert [b.tolist() for b in result.released_blocks or []] == [[0, 1, 2, 3], [0, 1, 4, 5]]
    assert result.free_blocks.tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (2, 3)])
def test_rows_by_head(paged: bool, shape: tuple[int, int]) -> None:
    layers, heads = shape
    k = [torch.randn(4, 10, 3, 5) for _ in range(2)]
    v = [torch.randn(4, 10, 3, 2) for _ in range(2)]
    scales = [torch.randn(4, 10, 3) for _ in range(2)]
    old = [[x.clone() for x in group] for group in (k, v, scales)]
    indices = torch.stack([torch.randperm(15)[:6].sort()[0] for _ in range(layers * heads)])
    indices = indices.reshape(layers, heads, 6)
    options: dict[str, Any] = {
        "keep_indices": indices,
        "cu_kept": [0, 6],
        "cu_rows": [0, 15],
        "prefix_lens": [1],
        "seq_lens": [18],
        "k_scales": scales,
    }
    if paged:
        table = torch.tensor([[2, 0, 3]])
        ops.compact_paged_kv_(k, v, table, **options)
        order = [2, 0]
    else:
        views = [
            [x.transpose(0, 1).reshape(1, 40, *x.shape[2:]) for x in g] for g in (k, v, scales)
        ]
        options["k_scales"] = views[2]
        old = [[x.clone() for x in group] for group in views]
        ops.compact_kv_(views[0], views[1], **options)
        k, v, scales = views
    for layer in range(2):
        for head in range(3):
            which = indices[layer if layers > 1 else 0, head if heads > 1 else 0]
            rows = torch.tensor([0, *(1 + which).tolist(), 16, 17])
            for group, was in zip((k, v, scales), old, strict=True):
                if paged:
                    now, then = group[layer][order].flatten(0, 1), was[layer][order].flatten(0, 1)
                else:
                    now, then = group[layer][0], was[layer][0]
                assert torch.equal(now[:9, head], then[rows, head])
