"""Compacting a whole KV cache, all layers of K and V, beside what PyTorch offers for it.

The caches of LLaVA-1.5-7B and -13B and of a model with 8 KV heads, after prompts of one picture. A
call moves the same rows whatever they hold, so it is timed again and again over the same caches.
Bytes count rows that change places only: what lies in front of the picture stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from gpu_shapes import TEXT, VISION
from gpu_timing import DEVICE, DRY_RUN, Case
from torch import Tensor

from adsc_kernels import CompressionSchedule, StagePlan, make_plan, ops

Caches = tuple[list[Tensor], list[Tensor]]
Kept = tuple[list[Tensor], list[Tensor], ops.DenseCache | ops.PagedCache]  # K, V, and an object


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    heads: int


LLAVA_7B, LLAVA_13B, GQA = Model("7B", 32, 32), Model("13B", 40, 40), Model("8 KV heads", 32, 8)
FEW = Model("4 layers of 7B", 4, 32)  # PyTorch's code for 64 tensors takes a minute to compile
if DRY_RUN:
    LLAVA_7B, LLAVA_13B, GQA = Model("7B", 2, 2), Model("13B", 2, 3), Model("8 KV heads", 2, 1)
    FEW = Model("1 layer of 7B", 1, 2)
HEAD = 8 if DRY_RUN else 128
LENGTH = TEXT + VISION


@dataclass(frozen=True)
class Cache:
    """One cell of what is measured; a block size of 0 is the dense cache [B, S, H, D]."""

    model: Model
    sequences: int
    keep: str = "1/4"
    block_size: int = 0
    layout: str = "NHD"
    dtype: torch.dtype = torch.bfloat16
    interleaved: bool = False  # K and V of a layer are views of one tensor [blocks, 2, ...]

    @property
    def name(self) -> str:
        where = f"blocks of {self.block_size}" if self.block_size else f"dense {self.layout}"
        where += ", K and V interleaved" if self.interleaved else ""
        kept = f"{VISION} to {self.kept}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.model.name}, batch {self.sequences}, {kept}, {where}, {dtype}"

    @property
    def kept(self) -> int:
        return CompressionSchedule.parse(f"1:{self.keep}", num_layers=2).kept(VISION)[1]

    def stage(self) -> StagePlan:
        schedule = CompressionSchedule.parse(f"1:{self.keep}", num_layers=2)
        bounds = [b * LENGTH for b in range(self.sequences + 1)]
        spans = [(b, TEXT // 3, VISION) for b in range(self.sequences)]
        return make_plan(schedule, bounds, spans, device=DEVICE).stages[1]

    @property
    def blocks(self) -> int:
        """Of one sequence."""
        return -(-LENGTH // (self.block_size or LENGTH))

    def table(self) -> np.ndarray:
        """Blocks in any order; for the dense cache, its sequences."""
        count = self.sequences * self.blocks
        order = np.random.default_rng(0).permutation(count) if self.block_size else range(count)
        return np.asarray(order, dtype=np.int32).reshape(self.sequences, self.blocks)

    def slots(self, sequence: np.ndarray, row: np.ndarray) -> Tensor:
        """Where rows lie, counted over the whole cache."""
        size = self.block_size or LENGTH
        blocks = self.table().astype(np.int64)[sequence, row // size]
        return torch.from_numpy(blocks * size + row % size).to(DEVICE)

    def make(self) -> Caches:
        size = self.block_size or LENGTH
        inner = (size, self.model.heads) if self.layout == "NHD" else (self.model.heads, size)
        shape = (self.sequences * self.blocks, *inner, HEAD)

        def tensor() -> Tensor:
            return torch.randint(-9, 9, shape, device=DEVICE, dtype=torch.int8).to(self.dtype)

        layers = range(self.model.layers)
        if self.interleaved:
            pairs = [torch.stack([tensor(), tensor()], 1) for _ in layers]
            return [pair[:, 0] for pair in pairs], [pair[:, 1] for pair in pairs]
        return [tensor() for _ in layers], [tensor() for _ in layers]


def compact(cache: Cache) -> Case:
    stage = cache.stage()
    lens, lens_in = np.asarray(stage.seq_lens), np.asarray(stage.seq_lens_in)
    sequence = np.repeat(np.arange(cache.sequences), lens)
    new = np.arange(stage.num_tokens) - np.repeat(lens.cumsum() - lens, lens)
    old = stage.source_rows() - np.repeat(lens_in.cumsum() - lens_in, lens)
    moving = new != old
    row_bytes = cache.model.heads * HEAD * cache.dtype.itemsize
    source = cache.slots(sequence[moving], old[moving])
    target = cache.slots(sequence[moving], new[moving])
    table = torch.from_numpy(cache.table()).to(DEVICE)

    def make() -> Kept:
        k, v = cache.make()
        if cache.block_size:
            return k, v, ops.PagedCache(k, v, table, layout=cache.layout)
        return k, v, ops.DenseCache(k, v, layout=cache.layout)

    def ours(caches: Kept) -> None:
        if isinstance(caches[2], ops.PagedCache):
            ops.compact_paged_kv_(caches[2], stage=stage)
        else:
            ops.compact_kv_(caches[2], stage=stage)

    def by_slot(tensor: Tensor) -> Tensor:
        """[slots, heads, D], a view; only for NHD."""
        return tensor.flatten(0, 1)

    def index_copy(caches: Kept) -> None:
        """index_select to a buffer, and index_copy_ from there."""
        for tensor in (*caches[0], *caches[1]):
            slots = by_slot(tensor)
            slots.index_copy_(0, target, slots.index_select(0, source))

    size = cache.block_size or LENGTH
    to, of = ((slots // size, slots % size) for slots in (target, source))

    def index_put(caches: Kept) -> None:
        """By block and row: a view of every second block can't be flattened."""
        for tensor in (*caches[0], *caches[1]):
            tensor.index_put_(to, tensor[of])

    kept = cache.slots(sequence, old)

    def select_and_back(caches: Kept) -> None:
        """The rows of every sequence to a buffer, and back in one piece: dense, all alike."""
        for tensor in (*caches[0], *caches[1]):
            rows = by_slot(tensor).index_select(0, kept).unflatten(0, (cache.sequences, -1))
            tensor[:, : rows.shape[1]].copy_(rows)

    by_head = torch.from_numpy(old[: lens[0]]).to(DEVICE)

    def select_by_head(caches: Kept) -> None:
        """The same for [B, H, S, D]."""
        for tensor in (*caches[0], *caches[1]):
            rows = tensor.index_select(2, by_head)
            tensor[:, :, : rows.shape[2]].copy_(rows)

    if cache.interleaved:
        baselines = {"eager": index_put}
    elif cache.layout == "HND":
        baselines = {"eager": select_by_head}
    elif cache.block_size:
        baselines = {"eager": index_copy}
    else:
        baselines = {"eager": select_and_back, "eager index_copy_": index_copy}
    return Case(
        "compact_paged_kv_" if cache.block_size else "compact_kv_",
        cache.name,
        2 * int(moving.sum()) * row_bytes * 2 * cache.model.layers,
        make,
        ours,
        baselines,
        compiled=cache.model == FEW,
        telling=cache in TELLING,
        tolerance=None,
    )


FP8 = torch.uint8  # as engines hold it
TELLING = [Cache(LLAVA_7B, batch, block_size=size) for batch in (8, 1) for size in (0, 16)]
CACHES = [  # most telling first
    *TELLING,
    *(Cache(LLAVA_7B, 32, block_size=size) for size in (0, 16)),
    Cache(GQA, 8, block_size=16),
    Cache(LLAVA_7B, 8, block_size=16, dtype=FP8),
    Cache(LLAVA_7B, 8, layout="HND"),
    Cache(LLAVA_7B, 8, block_size=16, interleaved=True),
    Cache(LLAVA_13B, 8),
    Cache(LLAVA_7B, 8, keep="1/9"),
    Cache(GQA, 8),
    Cache(LLAVA_7B, 8, dtype=FP8),
    Cache(LLAVA_13B, 8, block_size=16),
    Cache(LLAVA_7B, 1, keep="1/9"),
    Cache(LLAVA_7B, 8, keep="1/9", block_size=16),
    *(Cache(LLAVA_7B, 8, block_size=size) for size in (64, 1)),
    *(Cache(FEW, 8, block_size=size) for size in (0, 16)),
]
if DRY_RUN:
    TELLING = [Cache(LLAVA_7B, 2)]
    CACHES = [
        *TELLING,
        Cache(FEW, 1),
        Cache(GQA, 2, block_size=16),
        Cache(LLAVA_7B, 1, layout="HND"),
        Cache(LLAVA_7B, 2, block_size=16, interleaved=True, dtype=FP8),
    ]


def cases() -> Iterator[Case]:
    for cache in CACHES:
        yield compact(cache)
