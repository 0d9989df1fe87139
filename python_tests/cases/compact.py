"""Caches as engines lay them out, and what to do with them, drawn by hypothesis.

A case is built twice from one seed, run on two backends, and compared byte for byte: all of every
buffer, so also the gaps between views, what lies behind each sequence, and the guards around.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels import make_plan, ops
from adsc_kernels.kv.pages import CompactionResult
from adsc_kernels.ops import compact
from cases.plans import plans
from cases.refused import BY_THE_OP
from cases.run import Run, reference

DTYPES = [
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float16,
    torch.float32,
]
LISTS = ("seq_starts", "cu_kept", "cu_rows", "prefix_lens", "seq_lens")
ORDERS = [
    ("block", "token", "head"),
    ("block", "head", "token"),
    ("head", "block", "token"),
    ("token", "head", "block"),
]


@dataclass(frozen=True)
class Geometry:
    """One list of tensors (K, V or scales), a tensor for each layer."""

    heads: int  # 0: no head dimension
    last: int  # 0: no last dimension
    dtype: torch.dtype
    order: tuple[str, ...]  # how block, token and head lie in memory; the last dimension innermost
    gaps: tuple[int, ...]  # unused places in each of those, and behind the last dimension
    front: int  # elements in front of everything


@dataclass
class Built:
    buffers: list[Tensor]  # bytes
    arguments: dict[str, Any]


def fill(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


def build(
    g: Geometry, blocks: int | None, tokens: int, layout: str, seed: int, copies: int = 1
) -> tuple[Tensor, list[Tensor]]:
    """A buffer with `copies` views of it, interleaved inside the outermost dimension."""
    sizes = {"block": blocks or 1, "token": tokens, "head": max(g.heads, 1)}
    strides = {}
    step = max(g.last, 1) + g.gaps[3]
    for i in reversed(range(3)):
        if i == 0:
            inner = step
            step *= copies
        strides[g.order[i]] = step
        step *= sizes[g.order[i]] + g.gaps[i]
    width = g.dtype.itemsize
    buffer = fill((g.front + step + 8) * width, seed)
    names = ["token", "head"] if layout == "NHD" else ["head", "token"]
    names = [n for n in names if g.heads or n == "token"]
    if blocks is not None:
        names.insert(0, "block")
    shape = [sizes[n] for n in names] + ([g.last] if g.last else [])
    steps = [strides[n] for n in names] + ([1] if g.last else [])
    flat = buffer.view(g.dtype)
    return buffer, [flat.as_strided(shape, steps, g.front + i * inner) for i in range(copies)]


@st.composite
def geometries(draw: st.DrawFn, dtype: torch.dtype, heads: int, last: int) -> Geometry:
    gaps = draw(st.sampled_from([(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 2, 3), (0, 0, 0, 1)]))
    order = draw(st.sampled_from(ORDERS))
    return Geometry(heads, last, dtype, order, gaps, draw(st.sampled_from([0, 0, 1, 7])))


@dataclass(frozen=True)
class Rows:
    """Which rows of each sequence stay, in the forms the ops take."""

    arguments: dict[str, Any] = field(repr=False)
    old: tuple[tuple[int, ...], ...]  # of each sequence, the old row of every new one
    seq_lens: tuple[int, ...]


@st.composite
def rows(draw: st.DrawFn, max_suffix: int = 9) -> Rows:
    """A stage of a plan, whole or in chunks, or the same rows as explicit indices."""
    schedule, cu_seqlens, spans = draw(plans())
    whole = [b - a for a, b in pairwise(cu_seqlens)]
    chunks = None
    if draw(st.booleans()):
        begins = [draw(st.integers(0, n)) for n in whole]
        chunks = [(a, draw(st.integers(a, n))) for a, n in zip(begins, whole, strict=True)]
    plan = make_plan(schedule, cu_seqlens, spans, chunks=chunks)
    last = len(plan.stages) - 1
    i = draw(st.integers(0, last))
    stage = plan.between(i, draw(st.integers(i, last)))
    batch = len(whole)
    lengths = st.lists(st.integers(0, max_suffix), min_size=batch, max_size=batch)
    prefixes = draw(lengths) if chunks or draw(st.booleans()) else [0] * batch
    suffixes = draw(lengths) if draw(st.booleans()) else [0] * batch
    arguments: dict[str, Any] = {}
    if any(prefixes) or chunks:
        arguments["prefix_lens"] = prefixes
    totals = [p + n + s for p, n, s in zip(prefixes, stage.seq_lens_in, suffixes, strict=True)]
    sources = stage.source_rows()
    own, old = [], []
    for b in range(batch):
        begin, end = sum(stage.seq_lens[:b]), sum(stage.seq_lens[: b + 1])
        own.append(sources[begin:end] - sum(stage.seq_lens_in[:b]))
        behind = prefixes[b] + stage.seq_lens_in[b]
        kept = (prefixes[b] + own[-1]).tolist()
        old.append((*range(prefixes[b]), *kept, *range(behind, totals[b])))
    if draw(st.booleans()):
        arguments["stage"] = stage
        if any(suffixes):
            arguments["seq_lens"] = totals
    else:
        width = draw(st.sampled_from([torch.int32, torch.int64]))
        flat = np.concatenate([*own, np.empty(0, np.int64)])
        arguments["keep_indices"] = torch.from_numpy(flat).to(width)
        arguments["cu_kept"] = [0, *accumulate(stage.seq_lens)]
        arguments["seq_lens"] = totals
        if any(suffixes):
            arguments["cu_rows"] = [0, *accumulate(stage.seq_lens_in)]
    return Rows(arguments, tuple(old), tuple(totals))


def on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    """Every list of ints as Ints, as a caller has them who uploaded them before; int64."""
    return {
        name: ops.Ints(tuple(value), torch.tensor(value, dtype=torch.int64))
        if name in LISTS
        else value
        for name, value in arguments.items()
    }


@dataclass(frozen=True)
class Case:
    """Caches and rows. `blocks` None: packed."""

    geometries: dict[str, Geometry]  # k_caches, v_caches, k_scales, v_scales
    together: bool  # K and V are views of one storage
    num_layers: int
    layout: str
    blocks: int | None
    tokens: int
    rows: Rows
    extra: dict[str, Any]
    seed: int

    def build(self) -> Built:
        buffers: list[Tensor] = []
        lists: dict[str, list[Tensor]] = {name: [] for name in self.geometries}
        for layer in range(self.num_layers):
            for i, (name, g) in enumerate(self.geometries.items()):
                if self.together and name == "v_caches":
                    continue
                copies = 2 if self.together and name == "k_caches" else 1
                seed = self.seed + 7 * layer + i
                buffer, views = build(g, self.blocks, self.tokens, self.layout, seed, copies)
                buffers.append(buffer)
                lists[name].append(views[0])
                if copies == 2:
                    lists["v_caches"].append(views[1])
        arguments = {"v_caches": None, **lists, **self.rows.arguments, **self.extra}
        return Built(buffers, {**arguments, "layout": self.layout})


@st.composite
def all_geometries(draw: st.DrawFn) -> tuple[dict[str, Geometry], bool]:
    dtype = draw(st.sampled_from(DTYPES))
    heads, last = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 8, 16, 20]))
    lists = {"k_caches": draw(geometries(dtype, heads, last))}
    kind = draw(st.sampled_from(["none", "together", "alike", "other"]))
    if kind == "together":
        lists["v_caches"] = lists["k_caches"]
    elif kind == "alike":
        lists["v_caches"] = draw(geometries(dtype, heads, last))
    elif kind == "other":
        lists["v_caches"] = draw(geometries(dtype, draw(st.integers(1, 3)), last + 1))
    if draw(st.booleans()):
        for name in ("k_scales", "v_scales")[: len(lists)]:
            of = lists[name.replace("scales", "caches")]
            form = draw(st.sampled_from([(0, 0), (of.heads, 0), (of.heads, 2)]))
            lists[name] = draw(geometries(torch.float32, *form))
    return lists, kind == "together"


@st.composite
def dense_cases(draw: st.DrawFn) -> Case:
    chosen = draw(rows())
    lists, together = draw(all_geometries())
    batch = len(chosen.seq_lens)
    extra: dict[str, Any] = {}
    if batch and draw(st.booleans()):
        blocks, tokens = batch, max(chosen.seq_lens) + draw(st.integers(0, 3))
    else:
        room = [n + draw(st.integers(0, 3)) for n in chosen.seq_lens]
        bounds = [draw(st.integers(0, 3))]
        bounds = [*accumulate(room, initial=bounds[0])]
        extra["seq_starts"] = bounds
        blocks, tokens = None, bounds[-1] + draw(st.integers(0, 2))
    layout = draw(st.sampled_from(["NHD", "HND"]))
    num_layers, seed = draw(st.integers(1, 2)), draw(st.integers(0, 2**31))
    return Case(lists, together, num_layers, layout, blocks, tokens, chosen, extra, seed)


@st.composite
def paged_cases(draw: st.DrawFn) -> Case:
    chosen = draw(rows())
    lists, together = draw(all_geometries())
    size = draw(st.sampled_from([1, 2, 3, 4, 16]))
    pages = [-(-n // size) for n in chosen.seq_lens]
    width = max([*pages, 0]) + draw(st.integers(0, 2))
    pool = sum(pages) + draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**31))
    blocks = np.random.default_rng(seed).permutation(pool)
    table = np.full((len(pages), width + 1), draw(st.sampled_from([-1, 10**6])))
    for b, n in enumerate(pages):
        table[b, :n], blocks = blocks[:n], blocks[n:]
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    extra: dict[str, Any] = {
        "block_table": torch.from_numpy(table).to(dtype)[:, :width],
        "block_size": size,
        "edit_table": draw(st.booleans()),
    }
    slots = draw(st.booleans())
    shape = (None, pool * size) if slots else (pool, size)
    layout = draw(st.sampled_from(["NHD", "HND"]))
    num_layers = draw(st.integers(1, 2))
    return Case(lists, together, num_layers, layout, *shape, chosen, extra, seed)


def check_buffers(got: Built, wanted: Built) -> None:
    for i, (a, b) in enumerate(zip(got.buffers, wanted.buffers, strict=True)):
        if not torch.equal(a, b):
            at = int((a != b).nonzero()[0])
            raise AssertionError(f"buffer {i}: byte {at} of {a.numel()} is {a[at]}, not {b[at]}")


def check_results(got: CompactionResult, wanted: CompactionResult) -> None:
    assert got.seq_lens.host == wanted.seq_lens.host
    for name in ("slot_mapping", "block_table", "last_page_len", "indptr"):
        a, b = getattr(got, name), getattr(wanted, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name
    assert torch.equal(got.seq_lens.device, wanted.seq_lens.device)


def check(case: Case, run: Run, uploaded: bool = True) -> None:
    """A whole cache is what the reference makes of it. uploaded: lists of ints are Ints."""
    op = ops.compact_paged_kv_ if "block_table" in case.extra else ops.compact_kv_
    wanted, got = case.build(), case.build()
    wanted_result = reference(op, **wanted.arguments)
    result = run(op, **(on_device(got.arguments) if uploaded else got.arguments))
    check_buffers(got, wanted)
    check_results(result, wanted_result)


class _Recorded(Exception):
    pass


def op_arguments(built: Built) -> list[Any]:
    """What `torch.ops.*.compact_paged_kv_` is called with for these arguments of the public op."""

    def record(*arguments: Any) -> None:
        raise _Recorded(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "native", lambda name, like: None)
        patch.setattr(compact, "choose", lambda name, device: record)
        with pytest.raises(_Recorded) as recorded:
            compact.compact_paged_kv_(**built.arguments)
    return list(recorded.value.args)


@dataclass(frozen=True)
class Blocks:
    """A case with a table that may hold anything, and blocks that may not be written."""

    case: Case
    changes: list[tuple[int, int]]
    read_only: list[int] | None

    def build(self) -> tuple[list[Tensor], list[Any]]:
        """The buffers, and the arguments of the op."""
        built = self.case.build()
        arguments = op_arguments(built)
        table = arguments[2].clone()
        for place, block in self.changes:
            if table.numel():
                table.view(-1)[place % table.numel()] = block
        arguments[2] = table
        arguments[11] = (
            None if self.read_only is None else torch.tensor(self.read_only, dtype=torch.int64)
        )
        return built.buffers, arguments

    def check_refused_alike(
        self, op: Callable[..., Any], refusal: Callable[[str], AbstractContextManager[Any]]
    ) -> bool:
        """Whether the CPU op refuses. `op` then raises in refusal(argument) with no byte written,
        and else does the same."""
        (wanted, arguments), (got, same) = self.build(), self.build()
        saved = [buffer.clone() for buffer in got]
        try:
            outs = torch.ops.adsc_kernels.compact_paged_kv_(*arguments)
        except BY_THE_OP as error:
            name = str(error).split(":")[0]
            if name == "block_table" and self.read_only:
                # Another sequence may write a read-only block, and a kernel see that one first.
                name = f"({name}|read_only_blocks)"
            with refusal(name):
                op(*same)
            assert all(map(torch.equal, got, saved))
            return True
        results = op(*same)
        assert all(map(torch.equal, results, outs))
        assert all(map(torch.equal, got, wanted))
        return False


@st.composite
def blocks(draw: st.DrawFn, outside: bool) -> Blocks:
    """outside: entries may lie outside of the pool."""
    case = draw(paged_cases())
    pool = case.blocks or case.tokens // case.extra["block_size"]
    entry = st.integers(-2, pool + 1) if outside else st.integers(0, pool - 1)
    changes = draw(st.lists(st.tuples(st.integers(0, 99), entry), max_size=2))
    read_only = draw(st.none() | st.lists(st.integers(-1, pool), max_size=pool))
    return Blocks(case, changes, read_only)
