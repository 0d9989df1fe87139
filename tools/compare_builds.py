"""Whether two builds of the native code compute the same, bit for bit, on the CPU.

`python tools/compare_builds.py BEFORE AFTER [--cases 200] [--seed 0]`: each a folder with an
importable adsc_kernels, such as a checkout that was built in place or an unpacked wheel. Cases are
drawn by the seed and run in a process of their own for each build, through `torch.ops.adsc_kernels`
and `_C`, with arguments by position. What is compared is a hash of all that a case returns or
writes. Prints a line for each op; fails where one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate, pairwise
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PATTERNS = ["start", "center", "linspace"]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.uint8, torch.int16, torch.int64]


class Rows(NamedTuple):
    """What a batch keeps: a segment table, and the same as boundaries of each sequence."""

    segments: Tensor
    cu_kept: list[int]
    cu_rows: list[int]


def draw_rows(rng: Random, sequences: int) -> Rows:
    table, cu_kept, cu_rows = [], [0], [0]
    for _ in range(sequences):
        dst, src = cu_kept[-1], cu_rows[-1]
        for _ in range(rng.randint(0, 4)):
            span = rng.choice([0, 1, rng.randint(1, 60)])
            keep = rng.choice([span, rng.randint(min(span, 1), span)])
            first = rng.choice([0, 0, rng.randint(0, keep)])
            table.append([dst, src, span, keep, first, rng.randrange(3)])
            dst, src = dst + keep - first, src + span
        cu_kept.append(dst)
        cu_rows.append(src)
    segments = torch.tensor(table or [[0] * 6], dtype=torch.int32)
    return Rows(segments, cu_kept, cu_rows)


def ints(rng: Random, values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=rng.choice([torch.int32, torch.int64]))


def bits(rng: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bits at all, so NaNs too."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    size = torch.empty(0, dtype=dtype).element_size()
    flat = (int(np.prod(shape)) * size,)
    return (
        torch.randint(0, 256, flat, dtype=torch.uint8, generator=generator).view(dtype).view(shape)
    )


def numbers(rng: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def rows_tensor(rng: Random, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Rows of any width, with or without a gap between them."""
    width, gap = rng.choice([1, 2, 7, 64, 100]), rng.choice([0, 0, 3])
    return bits(rng, (num_rows, width + gap), dtype)[:, :width]


def selection(rng: Random, rows: Rows) -> tuple[Tensor | None, Tensor | None, int]:
    """segments, keep_indices, num_tokens."""
    if rows.cu_rows[-1] == 0 or rng.random() < 0.6:
        return rows.segments, None, rows.cu_kept[-1]
    indices = [rng.randrange(rows.cu_rows[-1]) for _ in range(rng.randint(0, 80))]
    return None, ints(rng, indices), len(indices)


def downsample(rng: Random, op: Any) -> Any:
    rows = draw_rows(rng, rng.randint(0, 4))
    return op(rows_tensor(rng, rows.cu_rows[-1], rng.choice(DTYPES)), *selection(rng, rows))


def downsample_many(rng: Random, op: Any) -> Any:
    rows = draw_rows(rng, rng.randint(0, 4))
    count = rng.choice([1, 2, 19])
    xs = [rows_tensor(rng, rows.cu_rows[-1], rng.choice(DTYPES)) for _ in range(count)]
    return op(xs, *selection(rng, rows))


def upsample_grad(rng: Random, op: Any) -> Any:
    rows = draw_rows(rng, rng.randint(0, 4))
    segments, indices, num_tokens = selection(rng, rows)
    grad = numbers(rng, (num_tokens, rng.choice([1, 7, 300])), rng.choice(FLOATS))
    return op(grad, segments, indices, rows.cu_rows[-1])


def norm_inputs(rng: Random, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    width, dtype = rng.choice([1, 7, 64, 600]), rng.choice(FLOATS)
    shapes = [(num_rows, width), (num_rows, width), (width,)]
    x, residual, weight = (numbers(rng, shape, dtype) for shape in shapes)
    return x, residual, weight


def downsample_add_rms_norm(rng: Random, op: Any) -> Any:
    rows = draw_rows(rng, rng.randint(0, 4))
    return op(*norm_inputs(rng, rows.cu_rows[-1]), *selection(rng, rows), rng.choice([0.0, 1e-6]))


class Layout(NamedTuple):
    cu_seqlens: Tensor
    spans: Tensor
    keep: list[int]
    pattern: str
    max_height: int


def fraction(rng: Random) -> list[int]:
    denominator = rng.randint(1, 9)
    return [rng.randint(0, denominator), denominator]


def draw_layout(rng: Random) -> Layout:
    grid = rng.random() < 0.3
    cu, spans = [0], []
    for b in range(rng.randint(0, 4)):
        position = rng.randint(0, 5)
        for _ in range(rng.randint(0, 3)):
            height, width = rng.randint(1, 6), rng.randint(1, 9)
            spans.append([b, position, height * width, height, width])
            position += height * width + rng.randint(0, 3)
        cu.append(cu[-1] + position)
    table = torch.tensor(spans, dtype=torch.int32).reshape(-1, 5)
    return Layout(
        torch.tensor(cu, dtype=torch.int32),
        table if grid else table[:, :3].contiguous(),
        fraction(rng) + (fraction(rng) if grid else []),
        "grid" if grid else rng.choice(PATTERNS),
        6,
    )


def rebuild_metadata(rng: Random, op: Any) -> Any:
    return op(*draw_layout(rng))


def boundary_arguments(rng: Random, rows: Rows) -> list[Any]:
    """All of boundary_step's."""
    if rng.random() < 0.5:
        layout = draw_layout(rng)
        num_rows = int(layout.cu_seqlens[-1])
        where: list[Any] = [None, None, *layout, num_rows]
    else:
        num_rows = rows.cu_rows[-1]
        *chosen, num_tokens = selection(rng, rows)
        where = [*chosen, None, None, [], "start", 0, num_tokens]
    hidden, residual, weight = norm_inputs(rng, num_rows)
    others = [rows_tensor(rng, num_rows, rng.choice(DTYPES)) for _ in range(rng.randint(0, 3))]
    both = [residual, weight] if rng.random() < 0.7 else [None, None]
    return [hidden, *both, 1e-6, others, *where]


def boundary_step(rng: Random, op: Any) -> Any:
    return op(*boundary_arguments(rng, draw_rows(rng, rng.randint(0, 4))))


class Cached(NamedTuple):
    num_layers: int
    heads: int
    rows: list[Any]  # segments, keep_indices, cu_kept, cu_rows, prefix_lens, seq_lens
    lens: list[int]


def draw_cached(rng: Random, one_selection: bool) -> Cached:
    """one_selection: the same rows for all layers and heads."""
    batch, num_layers, heads = rng.randint(1, 4), rng.randint(1, 3), rng.choice([1, 2, 4])
    rows = draw_rows(rng, batch)
    prefix = [rng.choice([0, rng.randint(0, 20)]) for _ in range(batch)]
    suffix = [rng.choice([0, rng.randint(0, 40)]) for _ in range(batch)]
    sizes = np.diff(rows.cu_rows).tolist()
    lens = [sum(parts) for parts in zip(prefix, sizes, suffix, strict=True)]
    chosen: list[Any] = [rows.segments, None]
    if rng.random() < 0.5:
        shape = (1, 1) if one_selection else (rng.choice([1, num_layers]), rng.choice([1, heads]))
        kept = np.diff(rows.cu_kept).tolist()
        indices = [
            [
                [
                    i
                    for n, m in zip(sizes, kept, strict=True)
                    for i in sorted(rng.sample(range(n), m))
                ]
                for _ in range(shape[1])
            ]
            for _ in range(shape[0])
        ]
        chosen = [None, ints(rng, indices)]  # type: ignore[arg-type]
    lengths = [ints(rng, values) for values in (rows.cu_kept, rows.cu_rows, prefix, lens)]
    return Cached(num_layers, heads, [*chosen, *lengths], lens)


def pools(rng: Random, cached: Cached, tokens: tuple[int, ...], hnd: bool) -> list[Tensor]:
    """K and V of each layer; tokens: their dimensions."""
    dtype, last = rng.choice(DTYPES), rng.choice([1, 5, 64])
    shape = (*tokens[:-1], cached.heads, tokens[-1]) if hnd else (*tokens, cached.heads)
    return [bits(rng, (*shape, last), dtype) for _ in range(2 * cached.num_layers)]


def dense_arguments(rng: Random, cached: Cached) -> tuple[list[Tensor], Tensor | None, str]:
    """caches, seq_starts, layout."""
    hnd, room = rng.random() < 0.5, rng.choice([0, 5])
    name = "HND" if hnd else "NHD"
    if rng.random() < 0.5:
        tokens = (len(cached.lens), max(cached.lens) + room)
        return pools(rng, cached, tokens, hnd), None, name
    starts = list(accumulate((n + room for n in cached.lens), initial=0))
    return pools(rng, cached, (starts[-1],), hnd), ints(rng, starts), name


def paged_arguments(rng: Random, cached: Cached) -> tuple[list[Tensor], Tensor, int, str]:
    """caches, block_table, block_size, layout."""
    hnd, size = rng.random() < 0.5, rng.choice([1, 4, 16])
    pages = [-(-n // size) for n in cached.lens]
    blocks = list(range(sum(pages) + 2))
    rng.shuffle(blocks)
    width = max(pages) + rng.randint(0, 2)
    table = [[blocks.pop() if i < n else -7 for i in range(width)] for n in pages]
    tokens = (sum(pages) + 2, size) if rng.random() < 0.7 else ((sum(pages) + 2) * size,)
    caches = pools(rng, cached, tokens, hnd)
    return caches, ints(rng, table), size, "HND" if hnd else "NHD"  # type: ignore[arg-type]


def compact_kv_(rng: Random, op: Any) -> Any:
    cached = draw_cached(rng, False)
    caches, starts, layout = dense_arguments(rng, cached)
    return op(caches, cached.num_layers, *cached.rows, starts, layout), caches


def compact_paged_kv_(rng: Random, op: Any) -> Any:
    edit = rng.random() < 0.5
    cached = draw_cached(rng, edit)
    caches, table, size, layout = paged_arguments(rng, cached)
    read_only = ints(rng, [rng.randrange(50)]) if rng.random() < 0.2 else None
    arguments = (table, size, *cached.rows, edit, read_only, layout)
    return op(caches, cached.num_layers, *arguments), caches


def compress_step(rng: Random, op: Any) -> Any:
    boundary = boundary_arguments(rng, draw_rows(rng, rng.randint(0, 4)))
    outs = torch.ops.adsc_kernels.boundary_step(*boundary)
    for out in outs:
        out.zero_()
    paged, edit = rng.random() < 0.5, rng.random() < 0.5
    cached = draw_cached(rng, edit)
    if paged:
        caches, table, size, layout = paged_arguments(rng, cached)
        arguments = (table, size, *cached.rows, None, edit, None, layout)
    else:
        caches, starts, layout = dense_arguments(rng, cached)
        arguments = (None, 0, *cached.rows, starts, False, None, layout)
    return op(*boundary, caches, cached.num_layers, *arguments, outs), caches, outs


def plan(rng: Random, module: Any) -> Any:
    layout = draw_layout(rng)
    code = 0 if layout.pattern == "grid" else PATTERNS.index(layout.pattern)
    boundaries = [[code, *layout.keep] for _ in range(rng.randint(1, 3))]
    cu = layout.cu_seqlens.tolist()
    chunks = [sorted(rng.randint(0, end - begin) for _ in range(2)) for begin, end in pairwise(cu)]
    align = rng.choice([1, 1, 4])
    return module.plan(boundaries, cu, layout.spans.tolist(), rng.choice([None, chunks]), align)


def keep_rule(rng: Random, module: Any) -> Any:
    n = rng.choice([rng.randint(1, 50), rng.randrange(1, 1 << 31)])
    m, pattern = rng.randint(1, n), rng.randrange(3)
    numbers = [rng.randrange(m) for _ in range(50)]
    return (
        [module.kept_index(pattern, j, n, m) for j in numbers],
        [module.kept_before(pattern, j, n, m) for j in numbers],
    )


OPS = [
    downsample, downsample_many, upsample_grad, downsample_add_rms_norm, rebuild_metadata,
    boundary_step, compact_kv_, compact_paged_kv_, compress_step,
]  # fmt: skip
HOST = [plan, keep_rule]


def feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.contiguous().reshape(-1).view(torch.uint8).numpy(), value.shape, value.dtype
    if isinstance(value, np.ndarray):
        digest.update(f"{value.shape}{value.dtype}".encode() + value.tobytes())
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)}(".encode())
        for part in value:
            feed(digest, part)
    else:
        digest.update(f"{value!r};".encode())


def outcome(case: Callable[[Random, Any], Any], seed: str, target: Any) -> str:
    """A hash, or the kind of error."""
    digest = hashlib.sha256()
    try:
        feed(digest, case(Random(seed), target))
    except (ValueError, RuntimeError) as error:
        return type(error).__name__
    return digest.hexdigest()


def work(cases: int, seed: int) -> None:
    """Of the build that is imported: the outcomes of each op's cases, as JSON."""
    import adsc_kernels
    from adsc_kernels import _C

    targets = {case: getattr(torch.ops.adsc_kernels, case.__name__) for case in OPS}
    targets.update(dict.fromkeys(HOST, _C))
    outcomes = {
        case.__name__: [outcome(case, f"{seed} {case.__name__} {i}", target) for i in range(cases)]
        for case, target in targets.items()
    }
    print(json.dumps({"from": os.path.dirname(adsc_kernels.__file__), "outcomes": outcomes}))


def outcomes_of(folder: str, cases: int, seed: int) -> dict[str, list[str]]:
    folder = os.path.realpath(folder)
    command = [sys.executable, __file__, "--work", "--cases", str(cases), "--seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": folder}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    said = json.loads(done.stdout)
    if os.path.realpath(said["from"]) != os.path.join(folder, "adsc_kernels"):
        sys.exit(f"{folder}: expected its adsc_kernels, but {said['from']} was imported")
    return said["outcomes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="two: before, after")
    parser.add_argument("--cases", type=int, default=200, help="of each op")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.cases, options.seed)
    if len(options.folders) != 2:
        parser.error(f"expected two folders, got {len(options.folders)}")
    before, after = (outcomes_of(f, options.cases, options.seed) for f in options.folders)
    same = True
    for name, wanted in before.items():
        equal = sum(map(str.__eq__, wanted, after[name]))
        refused = sum(len(one) < 64 for one in wanted)
        print(f"{name:24} {len(wanted):5} cases, {equal:5} equal, {refused:5} of them refused")
        same = same and equal == len(wanted)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
