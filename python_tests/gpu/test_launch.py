"""Calls that differ in nothing but what a compiled kernel depends on, one after the other: where
tensors begin, how far their rows are apart, lengths of 1, integers that are multiples of 16."""

from __future__ import annotations

import torch
from cases.segment_tables import by_stage, image_stage
from gpu_device import DEVICE, to_device
from torch import Tensor

from adsc_kernels import ops, reference

STAGES = [image_stage(1, text=5, vision=24, kept=7), image_stage(2, text=16, vision=16, kept=16)]
MOST = max(stage.num_tokens_in for stage in STAGES)
OFFSETS = (0, 1, 0, 8, 16, 1, 0)  # few: Triton compiles for each
BYTES = torch.randint(256, (MOST * 80 + 64,), dtype=torch.uint8)


def test_alignment_and_strides() -> None:
    there = BYTES.to(DEVICE)
    for stage in STAGES * 2:
        rows = torch.tensor(reference.source_rows(*by_stage(stage)), dtype=torch.int64)
        for width, stride in ((1, 1), (64, 64), (1, 16), (64, 80)):
            for offset in OFFSETS:
                place = (stage.num_tokens_in, width), (stride, 1), offset
                x = BYTES.as_strided(*place)
                moved = ops.downsample(there.as_strided(*place), to_device(stage))
                assert torch.equal(moved.cpu(), x[rows]), place


def test_lists_of_either_width() -> None:
    x = torch.arange(40, device=DEVICE).view(-1, 1)
    for dtype in (torch.int32, torch.int64, torch.int32):
        memory = torch.arange(39, -1, -1, dtype=dtype, device=DEVICE)
        for begin, count in ((0, 1), (1, 1), (4, 16), (1, 16), (0, 40), (3, 17)):
            rows = memory[begin : begin + count]
            assert torch.equal(ops.downsample(x, keep_indices=rows), x[rows.long()])


def compacted(caches: list[Tensor], kept: list[int]) -> list[Tensor]:
    return [torch.cat([x[:, kept], x[:, len(kept) :]], dim=1) for x in caches]


def test_caches_at_other_places() -> None:
    """The same caches and others, of which only the places in memory differ."""
    kept = [0, 3, 4, 9]
    there = BYTES.to(DEVICE)
    for offsets in ((0, 512), (0, 513), (1, 512), (0, 512), (16, 16 * 65), (0, 768)):
        caches = [there[offset : offset + 384].view(2, 12, 1, 16) for offset in offsets]
        expected = compacted(caches, kept)
        indices = torch.tensor(kept * 2, device=DEVICE)
        ops.compact_kv_(
            caches[:1], caches[1:], keep_indices=indices, cu_kept=[0, 4, 8], seq_lens=[12, 12]
        )
        for x, wanted in zip(caches, expected, strict=True):
            assert torch.equal(x, wanted)
