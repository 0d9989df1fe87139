"""KV compaction on the device against the reference on the CPU, every byte of every buffer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases.compact import Case, check, dense_cases, paged_cases
from gpu_caches import TEXT, VISION, image_stage, random
from gpu_device import DEVICE, DRY_RUN, another_stream, capture, hold_back, run_here
from hypothesis import given
from hypothesis import strategies as st

from adsc_kernels import ops

FORMS: dict[str, Callable[[Case], bool]] = {
    "stage": lambda case: "stage" in case.rows.arguments,
    "keep_indices": lambda case: "keep_indices" in case.rows.arguments,
    "NHD": lambda case: case.layout == "NHD",
    "HND": lambda case: case.layout == "HND",
    "K and V in one": lambda case: case.together,
    "K and V of two shapes": lambda case: (
        not case.together
        and "v_caches" in case.geometries
        and case.geometries["v_caches"].last != case.geometries["k_caches"].last
    ),
    "K alone": lambda case: "v_caches" not in case.geometries,
    "scales": lambda case: "k_scales" in case.geometries,
}
DENSE_FORMS = {
    **FORMS,
    "packed": lambda case: case.blocks is None,
    "batched": lambda case: case.blocks is not None,
}
PAGED_FORMS = {
    **FORMS,
    "slots": lambda case: case.blocks is None,
    "blocks": lambda case: case.blocks is not None,
    "table edited": lambda case: case.extra["edit_table"],
    "table kept": lambda case: not case.extra["edit_table"],
}


@pytest.mark.every_case
@pytest.mark.parametrize("form", DENSE_FORMS)
@given(data=st.data(), uploaded=st.booleans())
def test_dense(form: str, data: st.DataObject, uploaded: bool) -> None:
    check(data.draw(dense_cases().filter(DENSE_FORMS[form])), run_here, uploaded)


@pytest.mark.every_case
@pytest.mark.parametrize("form", PAGED_FORMS)
@given(data=st.data(), uploaded=st.booleans())
def test_paged(form: str, data: st.DataObject, uploaded: bool) -> None:
    check(data.draw(paged_cases().filter(PAGED_FORMS[form])), run_here, uploaded)


# ---- Caches of a real size ----


@pytest.mark.parametrize("keep", ["0", "1/9", "1/4", "1/2", "1"])
@pytest.mark.parametrize("batch", [1, 5])
def test_many_layers(batch: int, keep: str) -> None:
    """All layers in one call, K and V, beside PyTorch's gather."""
    stage = image_stage(batch, keep)
    layers = 3 if DRY_RUN else 32
    length, new = TEXT + VISION, stage.seq_lens[0]
    caches = [random(batch, length + 3, 8, 64) for _ in range(2 * layers)]
    before = [cache.clone() for cache in caches]
    result = ops.compact_kv_(caches[:layers], caches[layers:], stage)
    rows = torch.from_numpy(stage.source_rows()[:new]).to(DEVICE)
    assert result.seq_lens.device.tolist() == [new] * batch
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[:, :new], old[:, rows])
        assert torch.equal(cache[:, new:], old[:, new:])


@pytest.mark.parametrize("size", [1, 16, 64])
@pytest.mark.parametrize("edit", [False, True])
def test_paged_pool(size: int, edit: bool) -> None:
    stage = image_stage(4, "1/4")
    length, new = TEXT + VISION, stage.seq_lens[0]
    pages = -(-length // size)
    table = torch.randperm(4 * pages + 2)[: 4 * pages].reshape(4, pages).int()
    pools = [random(4 * pages + 2, size, 4, 128) for _ in range(4)]
    before = [pool.clone() for pool in pools]
    result = ops.compact_paged_kv_(
        pools[:2], pools[2:], table.to(DEVICE), stage, edit_table=edit, block_table_host=table
    )
    assert result.block_table is not None and result.free_blocks is not None
    assert len(result.free_blocks) == 4 * (pages - -(-new // size))
    rows = torch.from_numpy(stage.source_rows()[:new]).to(DEVICE)
    at = torch.arange(new, device=DEVICE)
    for pool, old in zip(pools, before, strict=True):
        flat, flat_before = pool.flatten(0, 1), old.flatten(0, 1)
        for b in range(4):
            now = result.block_table[b].long()[at // size] * size + at % size
            was = table.to(DEVICE)[b].long()[rows // size] * size + rows % size
            assert torch.equal(flat[now], flat_before[was])


def test_a_hundred_thousand_tokens() -> None:
    """One sequence whose rows hang on each other all the way, past 2^31 bytes into the cache."""
    vision = 1000 if DRY_RUN else 100_000
    width = 64 if DRY_RUN else 24 * 1024
    for keep in ("1/2", "9/10", "999/1000"):
        stage = image_stage(1, keep, vision)
        cache = random(TEXT + vision, 1, width)
        before = cache.clone()
        ops.compact_kv_(cache, None, stage)
        rows = torch.from_numpy(stage.source_rows()).to(DEVICE)
        assert torch.equal(cache[: len(rows)], before[rows])
        assert torch.equal(cache[len(rows) :], before[len(rows) :])


def test_captured_with_another_table_and_other_rows() -> None:
    stage = image_stage(2, "1/4")
    length, new, size = TEXT + VISION, stage.seq_lens[0], 16
    pages = -(-length // size)
    table = torch.zeros(2, pages, dtype=torch.int64, device=DEVICE)
    table.copy_(torch.arange(2 * pages).reshape(2, pages))
    pool = random(2 * pages, size, 2, 64)
    kept = torch.from_numpy(stage.source_rows()).to(DEVICE)
    kept[new:] -= length
    options = {
        "keep_indices": kept,
        "cu_kept": ops.Ints.of([0, new, 2 * new], DEVICE),
        "seq_lens": ops.Ints.of([length, length], DEVICE),
    }
    replay, _ = capture(lambda: ops.compact_paged_kv_(pool, None, table, **options).slot_mapping)
    at = torch.arange(new, device=DEVICE)
    for seed in range(3):
        generator = np.random.default_rng(seed)
        table.copy_(torch.from_numpy(generator.permutation(2 * pages).reshape(2, pages)))
        chosen = [np.sort(generator.choice(length, new, replace=False)) for _ in range(2)]
        kept.copy_(torch.from_numpy(np.concatenate(chosen)))
        pool.copy_(random(*pool.shape))
        before = pool.flatten(0, 1).clone()
        replay()
        for b, rows in enumerate(kept.split(new)):
            now = table[b][at // size] * size + at % size
            was = table[b][rows // size] * size + rows % size
            assert torch.equal(pool.flatten(0, 1)[now], before[was])


def test_current_stream() -> None:
    stage = image_stage(1, "1/4")
    new = random(TEXT + VISION, 2, 64)
    wanted, cache = new.clone(), torch.zeros_like(new)
    ops.compact_kv_(wanted, None, stage)
    torch.zeros(1, device=DEVICE).item()
    with another_stream():
        hold_back(30)
        cache.copy_(new)
        ops.compact_kv_(cache, None, stage)
    assert torch.equal(cache, wanted)


def test_takes_no_memory() -> None:
    """The moves need no buffer: a few lengths are all that is allocated."""
    if DRY_RUN:
        pytest.skip("counts CUDA memory")
    stage = image_stage(8, "1/4")
    caches = [random(8, TEXT + VISION, 8, 128) for _ in range(16)]
    ops.compact_kv_(caches[:8], caches[8:], stage)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.compact_kv_(caches[:8], caches[8:], stage)
    assert torch.cuda.max_memory_allocated() - before <= 1 << 16
