"""CPU compaction beside memcpy and PyTorch's two ways of doing it.

K and V of LLaVA-1.5-7B's 32 layers (32 heads of 128, bfloat16), prompts of one picture of 576
tokens, of which 144 or 64 stay, with 35 text tokens in front and 66 behind: batched NHD and HND,
and paged. The rows that move are read once and written once; memcpy copies as many bytes from one
dense block to another. Contestants take turns in one loop and the best of each is kept:
`extra_info` holds GB/s of bytes read and written, and shares of memcpy's and PyTorch's.

A compaction shrinks a cache whatever its bytes are, so the same cache is compacted again and again.

    pytest bench/test_compact_cpu.py --benchmark-enable --benchmark-json=compact_cpu.json
"""

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from adsc_kernels import CompressionSchedule, StagePlan, make_plan, ops

ROUNDS = 8
LAYERS, HEADS, DIM = 32, 32, 128
FRONT, VISION, BEHIND = 35, 576, 66


def stage_of(batch: int, kept: int) -> StagePlan:
    schedule = CompressionSchedule.parse(f"1:{kept}/{VISION}", num_layers=2)
    length = FRONT + VISION + BEHIND
    spans = [(b, FRONT, VISION) for b in range(batch)]
    return make_plan(schedule, [b * length for b in range(batch + 1)], spans).stages[1]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def best_seconds(contestants: dict[str, Callable[[], object]]) -> dict[str, float]:
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


@pytest.mark.parametrize("kept", [144, 64])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("form", ["NHD", "HND", "paged 16", "paged 1"])
def test_compact(
    benchmark: pytest.FixtureRequest, form: str, batch: int, kept: int, threads: int
) -> None:
    stage = stage_of(batch, kept)
    length = FRONT + VISION + BEHIND
    size = int(form.split()[1]) if "paged" in form else length
    blocks = -(-length // size) * batch
    shape = (HEADS, size) if form == "HND" else (size, HEADS)
    caches = [torch.zeros(blocks, *shape, DIM, dtype=torch.bfloat16) for _ in range(2 * LAYERS)]
    k, v = caches[:LAYERS], caches[LAYERS:]
    if "paged" in form:
        table = torch.randperm(blocks).reshape(batch, -1).int()

        def compact() -> object:
            return ops.compact_paged_kv_(k, v, table, stage)

        slots = table.long()[:, :, None] * size + torch.arange(size)
        rows = slots.flatten(1)[:, :length].reshape(-1)
        flat = [x.flatten(0, 1) for x in caches]
    else:
        table = None

        def compact() -> object:
            return ops.compact_kv_(k, v, stage, layout=form)

        rows = torch.arange(length * batch)
        flat = [x.transpose(1, 2) if form == "HND" else x for x in caches]

    sources = torch.from_numpy(stage.source_rows()).reshape(batch, -1)
    sources = sources - length * torch.arange(batch)[:, None]
    targets = torch.arange(sources.shape[1])
    moved = sources[0] != targets
    old, new = sources[0][moved], targets[moved]
    per_slot = [rows.reshape(batch, length)[:, which].reshape(-1) for which in (old, new)]

    def gather(x: Tensor) -> Tensor:
        return x.index_select(1, old) if table is None else x.index_select(0, per_slot[0])

    def index_select_and_back() -> None:
        for x in flat:
            moving = gather(x)
            if table is None:
                x[:, FRONT + 1 : sources.shape[1]] = moving
            else:
                x[per_slot[1]] = moving

    def index_copy() -> None:
        for x in flat:
            if table is None:
                x.index_copy_(1, new, gather(x))
            else:
                x.index_copy_(0, per_slot[1], gather(x))

    assert int(moved.sum()) == sources.shape[1] - FRONT - 1
    payload = torch.zeros(2 * LAYERS, batch * old.numel(), HEADS * DIM, dtype=torch.bfloat16)
    copy = torch.zeros_like(payload)
    seconds = best_seconds(
        {
            "compact": compact,
            "index_select and back": index_select_and_back,
            "index_copy_": index_copy,
            "memcpy": lambda: copy.copy_(payload),
        }
    )
    gbps = {name: 2 * payload.nbytes / s / 1e9 for name, s in seconds.items()}
    benchmark.extra_info.update(
        bytes=payload.nbytes,
        gb_per_second={name: round(value, 2) for name, value in gbps.items()},
        share_of_memcpy=round(gbps["compact"] / gbps["memcpy"], 3),
        times_pytorch=round(
            gbps["compact"] / max(gbps["index_select and back"], gbps["index_copy_"]), 2
        ),
    )
    benchmark.pedantic(compact, rounds=ROUNDS, warmup_rounds=1)
