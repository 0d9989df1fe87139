"""What a call costs the host, on tensors so small that moving them is nothing.

The way through Python and C++ is nearly the same for CPU and CUDA tensors, so these figures follow
a call's cost where there is no GPU. Each op takes turns with what it is held against, index_select
of one tensor, on one thread, in rounds so short that many are undisturbed; `extra_info` holds the
best of each and how many times as long the op takes.

    pytest bench/test_calls.py --benchmark-enable --benchmark-json=calls.json
"""

import time
from collections.abc import Callable, Iterator

import pytest
import torch

import adsc_kernels as adsc
from adsc_kernels import ops

CALLS, ROUNDS = 10, 200
PLAN = adsc.make_plan(
    adsc.CompressionSchedule.parse("1:1/4", num_layers=2), [0, 12, 24], [(0, 2, 8), (1, 2, 8)]
)
STAGE = PLAN.stages[1]
ROWS = STAGE.keep_indices()
HIDDEN, RESIDUAL = torch.randn(2, STAGE.num_tokens_in, 8).unbind()
WEIGHT = torch.ones(8)
OTHERS = [torch.arange(STAGE.num_tokens_in), HIDDEN[:, :4].clone(), HIDDEN[:, 4:].clone()]
NORM = {"residual": RESIDUAL, "weight": WEIGHT}
BOUNDS = torch.tensor([0, 12, 24], dtype=torch.int32)
SPANS = torch.tensor([[0, 2, 8], [1, 2, 8]], dtype=torch.int32)
K, V = ([torch.zeros(2, 12, 1, 8) for _ in range(32)] for _ in range(2))
K_PAGES, V_PAGES = ([torch.zeros(6, 4, 1, 8) for _ in range(32)] for _ in range(2))
TABLE = torch.arange(6, dtype=torch.int32).reshape(2, 3)
CACHE, FEW = ops.DenseCache(K, V), ops.DenseCache(K[:8], V[:8])
PAGES = ops.PagedCache(K_PAGES, V_PAGES, TABLE)

OPS: dict[str, Callable[[], object]] = {
    "downsample": lambda: ops.downsample(HIDDEN, STAGE),
    "downsample, keep_indices": lambda: ops.downsample(HIDDEN, keep_indices=ROWS),
    "downsample_many, 5 tensors": lambda: ops.downsample_many([HIDDEN, RESIDUAL, *OTHERS], STAGE),
    "downsample_add_rms_norm": lambda: ops.downsample_add_rms_norm(HIDDEN, RESIDUAL, WEIGHT, STAGE),
    "rebuild_metadata": lambda: ops.rebuild_metadata(BOUNDS, SPANS, "1/4"),
    "boundary_step, norm and 3 tensors": lambda: ops.boundary_step(
        HIDDEN, STAGE, others=OTHERS, **NORM
    ),
    "compact_kv_, 64 tensors": lambda: ops.compact_kv_(K, V, STAGE),
    "compact_kv_, an object of 64": lambda: ops.compact_kv_(CACHE, stage=STAGE),
    "compact_paged_kv_, 64 tensors": lambda: ops.compact_paged_kv_(K_PAGES, V_PAGES, TABLE, STAGE),
    "compact_paged_kv_, an object of 64": lambda: ops.compact_paged_kv_(PAGES, stage=STAGE),
    "compress_step, an object of 16": lambda: ops.compress_step(
        HIDDEN, FEW, STAGE, others=OTHERS[:1], **NORM
    ),
    "its two ops": lambda: (
        ops.boundary_step(HIDDEN, STAGE, others=OTHERS[:1], **NORM),
        ops.compact_kv_(FEW, stage=STAGE),
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def index_select() -> object:
    return torch.index_select(HIDDEN, 0, ROWS)


def seconds(run: Callable[[], object]) -> float:
    """Of one call, over many."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        run()
    return (time.perf_counter() - begin) / CALLS


@pytest.mark.parametrize("name", OPS)
def test_call(name: str, benchmark: pytest.FixtureRequest) -> None:
    run = OPS[name]
    run()
    pairs = [(seconds(run), seconds(index_select)) for _ in range(ROUNDS)]
    ours, theirs = (min(times) for times in zip(*pairs, strict=True))
    benchmark.extra_info["microseconds"] = round(ours * 1e6, 2)
    benchmark.extra_info["index_select_microseconds"] = round(theirs * 1e6, 2)
    benchmark.extra_info["times_index_select"] = round(ours / theirs, 2)
    benchmark.pedantic(run, rounds=ROUNDS, iterations=CALLS)
