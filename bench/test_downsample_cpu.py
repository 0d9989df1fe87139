"""CPU `downsample` beside torch.index_select and memcpy.

64 MiB: rows of 4096 bfloat16, a uniform 576 -> 144 and a ragged batch with text, on 1 and 2
threads. The contestants take turns in one loop, so that whatever else the machine does hits all
alike, and the best of each is kept: `extra_info` holds GB/s (bytes read and written) and the share
of memcpy's. memcpy copies as many bytes from one dense block to another: glibc's (one thread only),
and torch's `copy_`.

`reused` memory: the C library is told to keep what is freed, as jemalloc and tcmalloc do, so that
the time is that of moving rows. `fresh`: as it comes, where every output of this size is new memory
and having the kernel zero and map its pages takes twice as long as the copy. There memcpy gets a
new output too. downsample asks for large pages, which halves that time where the system grants them
on request (`THP_MEM_ALLOC_ENABLE=1` has torch ask for all of its outputs).

    pytest bench/test_downsample_cpu.py --benchmark-enable --benchmark-json=downsample_cpu.json
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from adsc_kernels import CompressionSchedule, StagePlan, make_plan, ops

ROUNDS = 40
LIBC = ctypes.CDLL(None)
DEFAULT_LIMIT = 128 << 10


def stage_of(prompts: list[tuple[int, int]]) -> StagePlan:
    """Prompts of text tokens around one image of vision tokens, a quarter of which stays."""
    schedule = CompressionSchedule.parse("1:1/4", num_layers=2)
    cu_seqlens = [0, *accumulate(text + vision for text, vision in prompts)]
    spans = [(i, text // 2, vision) for i, (text, vision) in enumerate(prompts)]
    return make_plan(schedule, cu_seqlens, spans).stages[1]


STAGES = {
    "uniform": stage_of([(0, 576)] * 57),
    "ragged": stage_of([(17 * i % 211, 576 if i % 5 else 64) for i in range(38)]),
}


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["fresh", "reused"])  # in this order: what is kept stays
def memory(request: pytest.FixtureRequest) -> Iterator[str]:
    if not hasattr(LIBC, "mallopt"):
        pytest.skip("needs glibc, whose mallopt makes the difference")
    set_limits(1 << 30 if request.param == "reused" else DEFAULT_LIMIT)
    yield request.param
    set_limits(DEFAULT_LIMIT)


def set_limits(size: int) -> None:
    """Blocks up to this size, and as much free memory, stay with the process; now, and from now."""
    LIBC.mallopt(-1, size)  # M_TRIM_THRESHOLD
    LIBC.mallopt(-3, size)  # M_MMAP_THRESHOLD
    LIBC.malloc_trim(0)


def best_seconds(contestants: dict[str, Callable[[], object]]) -> dict[str, float]:
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


def memcpy_contestants(
    payload: Tensor, memory: str, threads: int
) -> dict[str, Callable[[], object]]:
    if memory == "fresh":
        return {"memcpy (torch clone)": payload.clone}
    out = torch.empty_like(payload)
    size = payload.nbytes
    contestants: dict[str, Callable[[], object]] = {
        "memcpy (torch copy_)": lambda: out.copy_(payload)
    }
    if threads == 1:
        contestants["memcpy (glibc)"] = lambda: ctypes.memmove(
            out.data_ptr(), payload.data_ptr(), size
        )
    return contestants


@pytest.mark.parametrize("name", STAGES)
def test_64_mib(benchmark: pytest.FixtureRequest, name: str, threads: int, memory: str) -> None:
    stage = STAGES[name]
    x = torch.randn(stage.num_tokens_in, 4096, dtype=torch.bfloat16)
    rows = stage.keep_indices()
    payload = x[: stage.num_tokens].clone()
    assert torch.equal(ops.downsample(x, stage), torch.index_select(x, 0, rows))

    seconds = best_seconds(
        {
            "downsample": lambda: ops.downsample(x, stage),
            "downsample (keep_indices)": lambda: ops.downsample(x, keep_indices=rows),
            "index_select": lambda: torch.index_select(x, 0, rows),
            **memcpy_contestants(payload, memory, threads),
        }
    )
    gbps = {name: 2 * payload.nbytes / s / 1e9 for name, s in seconds.items()}
    benchmark.extra_info.update(
        bytes=payload.nbytes,
        gb_per_second={name: round(value, 2) for name, value in gbps.items()},
        share_of_memcpy={
            name: round(gbps["downsample"] / value, 3)
            for name, value in gbps.items()
            if name.startswith("memcpy")
        },
        share_of_index_select=round(gbps["downsample"] / gbps["index_select"], 3),
    )
    benchmark.pedantic(lambda: ops.downsample(x, stage), rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("what", ["positions", "hidden 64"])
def test_small(benchmark: pytest.FixtureRequest, what: str, batch: int) -> None:
    """Where the fixed cost of a call counts: 1-D int64 positions, and narrow rows."""
    stage = stage_of([(101, 576)] * batch)
    trailing = () if what == "positions" else (64,)
    x = torch.zeros(stage.num_tokens_in, *trailing, dtype=torch.int64)
    rows = stage.keep_indices()
    repeat = 200

    def many(run: Callable[[], object]) -> Callable[[], None]:
        def loop() -> None:
            for _ in range(repeat):
                run()

        return loop

    seconds = best_seconds(
        {
            "downsample": many(lambda: ops.downsample(x, stage)),
            "index_select": many(lambda: torch.index_select(x, 0, rows)),
        }
    )
    benchmark.extra_info["microseconds"] = {
        name: round(s / repeat * 1e6, 2) for name, s in seconds.items()
    }
    benchmark(lambda: ops.downsample(x, stage))
