"""Calls of the compaction ops, and the good arguments that they spoil."""
# ruff: noqa: E501 (tables of cases, one a line)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adsc_kernels import UnsupportedError, ops
from cases.plans import image_plan

STAGE = image_plan(2, keep="1/4", text=4, vision=8, tail=4)  # 2 sequences, 16 rows to 10
TABLE = torch.arange(8, dtype=torch.int32).reshape(2, 4)
INDICES = torch.tensor([0, 2, 1, 3])
BY_INDEX: dict[str, Any] = {"keep_indices": INDICES, "cu_kept": [0, 2, 4], "seq_lens": [16, 16]}


def dense(**options: Any) -> Callable[[], object]:
    def call() -> object:
        k, v = torch.ones(2, 20, 3, 4), torch.ones(2, 20, 3, 4)
        arguments: dict[str, Any] = {"k_caches": k, "v_caches": v, "stage": STAGE, **options}
        return ops.compact_kv_(**arguments)

    return call


def packed(**options: Any) -> Callable[[], object]:
    return dense(**{"k_caches": torch.ones(40, 3, 4), "v_caches": None, **options})


def paged(**options: Any) -> Callable[[], object]:
    def call() -> object:
        k, v = torch.ones(9, 4, 3, 5), torch.ones(9, 4, 3, 5)
        arguments: dict[str, Any] = {
            "k_caches": k, "v_caches": v, "block_table": TABLE, "stage": STAGE, **options
        }  # fmt: skip
        return ops.compact_paged_kv_(**arguments)

    return call


def table_with(block: int, at: tuple[int, int] = (1, 2)) -> Tensor:
    table = TABLE.clone()
    table[at] = block
    return table


BOTH = torch.ones(2, 20, 3, 4)
WHOLE = torch.ones(79, 3, 4)
BAD_CALLS = {
    "not a tensor": (dense(k_caches=[[1]]), TypeError, r"^k_caches\[0\]: .*list"),
    "sparse": (dense(k_caches=BOTH.to_sparse()), TypeError, r"^k_caches\[0\]: .*sparse"),
    "none": (dense(k_caches=[]), ValueError, "^k_caches: .*at least one"),
    "lists of other lengths": (dense(v_caches=[BOTH, BOTH.clone()]), ValueError, "^v_caches: expected 1 tensors, .*got 2"),
    "rank": (dense(k_caches=torch.ones(2, 3)), ValueError, r"^k_caches\[0\]: expected 3 or 4 dim"),
    "ranks differ": (dense(v_caches=torch.ones(40, 3, 4)), ValueError, r"^v_caches\[0\]: expected 4 dim"),
    "dtypes differ": (dense(v_caches=BOTH.half()), TypeError, r"^v_caches\[0\]: expected torch.float32.*float16"),
    "devices differ": (dense(v_caches=BOTH.to("meta")), ValueError, r"^v_caches\[0\]: .*device .*meta"),
    "tokens differ": (dense(v_caches=torch.ones(2, 21, 3, 4)), ValueError, r"^v_caches\[0\]: expected 2 blocks of 20 tokens"),
    "layers of other tokens": (dense(k_caches=[BOTH, torch.ones(2, 19, 3, 4)], v_caches=None), ValueError, r"^k_caches\[1\]: .*20 tokens"),
    "stride on D": (dense(k_caches=torch.ones(2, 20, 4, 3).transpose(2, 3)), ValueError, r"^k_caches\[0\]: .*unit stride"),
    "K is V": (dense(k_caches=BOTH, v_caches=BOTH), ValueError, r"^k_caches\[0\], v_caches\[0\]: .*share memory"),
    "layers overlap": (dense(k_caches=[BOTH, BOTH.clone()], v_caches=[BOTH.clone(), BOTH]), ValueError, "share memory"),
    "K and V overlap in part": (packed(k_caches=WHOLE[:40], v_caches=WHOLE[39:]), ValueError, "share memory"),
    "expanded": (dense(k_caches=torch.ones(1, 20, 3, 4).expand(2, 20, 3, 4)), ValueError, r"^k_caches\[0\]: .*don't share memory"),
    "needs a gradient": (dense(k_caches=BOTH.clone().requires_grad_()), ValueError, r"^k_caches\[0\]: .*gradient"),
    "layout": (dense(layout="BSHD"), ValueError, "^layout: expected one of 'NHD' or 'HND'"),
    "layout that does not fit": (dense(layout="HND"), ValueError, "^seq_lens: expected at most 3 rows"),
    "scales without V": (dense(v_caches=None, v_scales=torch.ones(2, 20)), ValueError, "^v_scales: "),
    "scales of other heads": (dense(k_scales=torch.ones(2, 20, 4)), ValueError, r"^k_scales\[0\]: expected 3 heads"),
    "scales of other tokens": (dense(k_scales=torch.ones(2, 19, 3)), ValueError, r"^k_scales\[0\]: expected 2 blocks of 20"),
    "scales rank": (dense(k_scales=torch.ones(2)), ValueError, r"^k_scales\[0\]: expected 2 to 4 dim"),
    "batch": (dense(k_caches=torch.ones(3, 20, 3, 4), v_caches=None), ValueError, r"^k_caches\[0\]: expected 2 sequences"),
    "both": (dense(**BY_INDEX), ValueError, "^stage, keep_indices: .*both"),
    "neither": (dense(stage=None), ValueError, "^stage, keep_indices: .*neither"),
    "cu_kept with a stage": (dense(cu_kept=[0, 1, 2]), ValueError, "^cu_kept: expected None"),
    "no cu_kept": (dense(stage=None, **{**BY_INDEX, "cu_kept": None}), ValueError, "^cu_kept: expected it"),
    "no seq_lens": (dense(stage=None, **{**BY_INDEX, "seq_lens": None}), ValueError, "^seq_lens: expected it"),
    "past capacity": (dense(seq_lens=[16, 21]), ValueError, "^seq_lens: expected at most 20 rows.* 1, got 21"),
    "shorter than the stage": (dense(seq_lens=[15, 16]), ValueError, "^seq_lens: expected at least"),
    "prefix and rows": (dense(prefix_lens=[1, 1], seq_lens=[17, 16]), ValueError, "^seq_lens: expected at least 1 .* sequence 1"),
    "count of seq_lens": (dense(seq_lens=[16]), ValueError, "^seq_lens: expected 2 of them, got 1"),
    "negative": (dense(seq_lens=[16, -1]), ValueError, "^seq_lens: expected at least 0, got -1"),
    "floats": (dense(seq_lens=[16, 16.0]), TypeError, "^seq_lens: expected an int"),
    "a tensor of lengths": (dense(seq_lens=torch.tensor([16, 16])), TypeError, "^seq_lens: expected host ints or Ints"),
    "Ints of floats": (dense(seq_lens=ops.Ints((16, 16), torch.ones(2))), TypeError, "^seq_lens.device: .*int32 or .*int64"),
    "Ints elsewhere": (dense(seq_lens=ops.Ints((16, 16), torch.zeros(2, dtype=torch.int32, device="meta"))), ValueError, "^seq_lens.device: .*meta"),
    "Ints of another shape": (dense(seq_lens=ops.Ints((16, 16), torch.zeros(3, dtype=torch.int32))), ValueError, r"^seq_lens.device: .*\[2\]"),
    "seq_starts batched": (dense(seq_starts=[0, 20, 40]), ValueError, "^seq_starts: expected None"),
    "seq_starts count": (packed(seq_starts=[0, 20]), ValueError, "^seq_starts: expected 3"),
    "seq_starts fall": (packed(seq_starts=[0, 30, 20]), ValueError, "^seq_starts: expected rising"),
    "seq_starts past the end": (packed(seq_starts=[0, 20, 41]), ValueError, "^seq_starts: .*at most 40"),
    "room of a sequence": (packed(seq_starts=[0, 15, 40]), ValueError, "^seq_lens: expected at most 15 rows, the room of sequence 0"),
    "packed too short": (packed(k_caches=torch.ones(31, 3, 4)), ValueError, r"^k_caches\[0\]: expected at least 32"),
    "packed by indices": (packed(stage=None, **BY_INDEX), ValueError, "^seq_starts: expected it"),
    "chunks without prefix": (dense(stage=replace(STAGE, cached_lens=(0, 3))), ValueError, "^prefix_lens: expected"),
    "segments elsewhere": (dense(stage=replace(STAGE, segments=STAGE.segments.to("meta"))), ValueError, "^stage.segments: .*meta"),
    "segments empty": (dense(stage=replace(STAGE, segments=STAGE.segments[:0])), ValueError, "^stage.segments: .*empty"),
    "cu_seqlens shape": (dense(stage=replace(STAGE, cu_seqlens=STAGE.cu_seqlens[:2])), ValueError, "^stage.cu_seqlens: "),
    "indices dtype": (dense(stage=None, **{**BY_INDEX, "keep_indices": INDICES.float()}), TypeError, "^keep_indices: .*float32"),
    "indices count": (dense(stage=None, **{**BY_INDEX, "keep_indices": INDICES[:3]}), ValueError, "^keep_indices: expected 4 rows"),
    "indices fall": (dense(stage=None, **{**BY_INDEX, "keep_indices": torch.tensor([2, 0, 1, 3])}), ValueError, "^keep_indices: expected rising values in sequence 0"),
    "indices twice": (dense(stage=None, **{**BY_INDEX, "keep_indices": torch.tensor([0, 2, 3, 3])}), ValueError, "^keep_indices: expected rising values in sequence 1"),
    "indices past the sequence": (dense(stage=None, **{**BY_INDEX, "keep_indices": torch.tensor([0, 2, 3, 16])}), ValueError, r"^keep_indices: expected values in \[0, 16\) for sequence 1, got 16"),
    "indices negative": (dense(stage=None, **{**BY_INDEX, "keep_indices": torch.tensor([-1, 2, 3, 4])}), ValueError, "^keep_indices: .*got -1"),
    "indices of other heads": (dense(stage=None, **{**BY_INDEX, "keep_indices": INDICES.expand(2, 4).contiguous()}), ValueError, "^keep_indices: expected 1 or 3 heads"),
    "indices of other layers": (dense(stage=None, **{**BY_INDEX, "keep_indices": INDICES.expand(2, 1, 4).contiguous()}), ValueError, "^keep_indices: expected 1 or 1 layers"),
    "heads and scales of tokens": (dense(stage=None, k_scales=torch.ones(2, 20), **{**BY_INDEX, "keep_indices": INDICES.expand(3, 4).contiguous()}), UnsupportedError, "^keep_indices: .*scales"),
    "cu_kept falls": (dense(stage=None, **{**BY_INDEX, "cu_kept": [0, 4, 2]}), ValueError, "^cu_kept: expected boundaries"),
    "kept more than there are": (dense(stage=None, cu_rows=[0, 1, 16], **BY_INDEX), ValueError, "^cu_kept: expected at most 1 rows"),
    "block_size": (paged(block_size=5), ValueError, "^block_size: expected 4, dimension 1 .*NHD"),
    "block_size 0": (paged(block_size=0), ValueError, "^block_size: .*at least 1"),
    "no block_size for slots": (paged(k_caches=torch.ones(36, 3, 5), v_caches=None), ValueError, "^block_size: expected it"),
    "block_size of slots": (paged(k_caches=torch.ones(37, 3, 5), v_caches=None, block_size=4), ValueError, "^block_size: expected a divisor"),
    "table list": (paged(block_table=[[0]]), TypeError, "^block_table: .*list"),
    "table dtype": (paged(block_table=TABLE.short()), TypeError, "^block_table: .*int16"),
    "table device": (paged(block_table=TABLE.to("meta")), ValueError, "^block_table: .*meta"),
    "table shape": (paged(block_table=TABLE[0]), ValueError, r"^block_table: expected shape \[2, max_blocks\]"),
    "table strides": (paged(block_table=TABLE.repeat(1, 2)[:, ::2]), ValueError, "^block_table: .*unit stride"),
    "table too narrow": (paged(block_table=TABLE[:, :3]), ValueError, "^seq_lens: expected at most 3 blocks of 4"),
    "block outside": (paged(block_table=table_with(9)), ValueError, r"^block_table: expected blocks in \[0, 9\), got 9 at \[1, 2\]"),
    "block negative": (paged(block_table=table_with(-1)), ValueError, "^block_table: .*got -1"),
    "block shared": (paged(block_table=table_with(1)), ValueError, "^block_table: .*block 1 2 times"),
    "block twice in a sequence": (paged(block_table=table_with(7)), ValueError, "^block_table: .*block 7 2 times"),
    "host table outside": (paged(block_table_host=table_with(99)), ValueError, "^block_table_host: .*got 99"),
    "host table dtype": (paged(block_table_host=TABLE.float()), TypeError, "^block_table_host: .*float32"),
    "host table elsewhere": (paged(block_table_host=TABLE.to("meta")), ValueError, "^block_table_host: .*meta"),
    "host table shape": (paged(block_table_host=TABLE[:, :2]), ValueError, "^block_table_host: expected 4 blocks"),
    "read-only written": (paged(read_only_blocks=[1]), ValueError, "^read_only_blocks: .*block 1, but sequence 0"),
    "read-only elsewhere than the table": (paged(read_only_blocks=torch.zeros(1, dtype=torch.int32, device="meta")), ValueError, "^read_only_blocks: expected blocks in host memory.*meta"),
    "read-only floats": (paged(read_only_blocks=[0.5]), TypeError, "^read_only_blocks: expected integers"),
    "table forgotten": (paged(block_table=None), TypeError, "^block_table: .*got None"),
    "edited by heads": (paged(edit_table=True, stage=None, **{**BY_INDEX, "keep_indices": INDICES.expand(3, 4).contiguous()}), UnsupportedError, "^edit_table: "),
}  # fmt: skip

# Calls with an object: what it says can't be said again.
BAD_OBJECTS = {
    "V forgotten": (lambda: ops.compact_kv_(BOTH, stage=STAGE), ValueError, "^v_caches: expected 1 tensors, as k_caches, got 0"),
    "a cache of the other kind": (lambda: ops.compact_paged_kv_(ops.DenseCache(BOTH, None), stage=STAGE), TypeError, "^k_caches: expected tensors or a PagedCache, got a DenseCache"),
    "V in both": (lambda: ops.compact_kv_(ops.DenseCache(BOTH, BOTH.clone()), BOTH.clone(), STAGE), ValueError, "^v_caches: .*got it in both"),
    "a layout in both": (lambda: ops.compact_kv_(ops.DenseCache(BOTH, None), None, STAGE, layout="NHD"), ValueError, "^layout: .*in the DenseCache or in the call"),
    "lengths in both": (lambda: ops.compact_kv_(ops.DenseCache(BOTH, None, seq_lens=[16, 16]), None, STAGE, seq_lens=[16, 16]), ValueError, "^seq_lens: .*got it in both"),
    "edit_table in both": (lambda: ops.compact_paged_kv_(ops.PagedCache(BOTH, None, TABLE, edit_table=True), stage=STAGE, edit_table=True), ValueError, "^edit_table: .*PagedCache"),
}  # fmt: skip
