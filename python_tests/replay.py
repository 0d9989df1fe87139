"""CUDA graphs, on a CPU: what was recorded at capture is done again, on the same memory.

Every op that a captured call makes is kept with its arguments as they were: tensors where they lie,
and the host's numbers as they are then. A replay calls those ops once more and writes what they
return where it was returned first. Whatever the call did beside ops, it does no more: a length that
the host counted stays what it was, and so does an upload. Capturing itself runs ops here, on copies
of the inputs, but a graph must not depend on that: what it wrote to the cache is undone.

`by_address` has what Triton does on a GPU done by such ops, on rows that are given or lie at an
address: so a replay sees the cache that it is told of, and one that it isn't told of it can't see.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adsc_kernels import attention_backends, attention_calls, pointwise
from adsc_kernels.attention_keys import PagedKeys
from adsc_kernels.graphs import Graph

written: list[tuple[Tensor, Tensor]] = []  # what ops wrote to by address, and its contents


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []  # what ops wrote to, and its contents

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(op._schema.arguments, args, strict=False):
            if argument.is_write:
                self.before += [(x, x.clone()) for x in tree_leaves(value)]
        out = op(*args, **kwargs)
        self.calls.append((op, args, kwargs, out))
        return out

    def undo(self) -> None:
        for tensor, contents in reversed(self.before):
            tensor.copy_(contents)

    def replay(self) -> None:
        for op, args, kwargs, out in self.calls:
            new = op(*args, **kwargs)
            if op.is_view or any(a.is_write for a in op._schema.arguments):
                continue
            for mine, other in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(other)


class Captures:
    """In place of `graphs.capture`; `made` are the graphs."""

    def __init__(self) -> None:
        self.made: list[Graph] = []
        self.replays = 0

    def __call__(self, run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Graph:
        copies = tuple(x.clone() for x in inputs)
        recorder = Recorder()
        written.clear()
        with recorder:
            output = run(*copies)
        recorder.undo()
        for tensor, contents in reversed(written):
            tensor.copy_(contents)
        output.fill_(torch.nan)  # nothing is there before the first replay

        def replay() -> None:
            self.replays += 1
            recorder.replay()

        self.made.append(Graph(copies, output, replay))
        return self.made[-1]


def rows_at(place: Tensor, like: Tensor, count: int) -> Tensor:
    """`count` rows of like's form, which are `place`, or begin at the address in it."""
    if place.dtype is not torch.int64:
        return place
    memory = (ctypes.c_byte * (count * like[0].nbytes)).from_address(int(place))
    return torch.frombuffer(memory, dtype=like.dtype).view(count, *like.shape[1:])


@torch.library.custom_op("adsc_tests::rotate", mutates_args=("qkv", "k", "v"))
def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, k: Tensor, v: Tensor, rows: Tensor
) -> None:
    """In place, and into rows of the cache; into none where they are negative."""
    low, high = qkv[:, :-kv_heads].chunk(2, dim=-1)
    qkv[:, :-kv_heads] = qkv[:, :-kv_heads] * cos + torch.cat((high, low), dim=-1) * sin
    own = rows >= 0
    for place, new in ((k, qkv[:, -2 * kv_heads : -kv_heads]), (v, qkv[:, -kv_heads:])):
        cache = rows_at(place, new, max(rows.tolist(), default=-1) + 1)
        written.append((cache, cache.clone()))
        cache[rows[own]] = new[own]


@torch.library.custom_op("adsc_tests::step", mutates_args=())
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    table: Tensor,
    size: int,
    longest: int,
    heads: int,
) -> Tensor:
    """One query row of each sequence over its keys in the cache: in blocks of `size`, if any."""
    outs = []
    ends = bounds.tolist()
    for b, (row, begin, end) in enumerate(zip(q, ends[::2], ends[1::2], strict=False)):
        assert 0 < end - begin <= longest
        keys = torch.arange(begin, end)
        if size:
            keys = table[b].long()[keys // size] * size + keys % size
        assert keys.min() >= 0
        some_k, some_v = (rows_at(x, q[:, :heads], int(keys.max()) + 1)[keys] for x in (k, v))
        parts = (x.transpose(0, 1)[None] for x in (row[None], some_k, some_v))
        outs.append(F.scaled_dot_product_attention(*parts, enable_gqa=True)[0, :, 0])
    return torch.stack(outs)


def by_address(patch: pytest.MonkeyPatch) -> None:
    """Triton's part of a layer, and its attention of a step, by these ops."""
    from adsc_kernels.triton import pointwise as kernels

    def rotate_(qkv: Any, rope: Any, num_kv_heads: int, place: Any) -> None:
        nowhere = (qkv[:0, :num_kv_heads].clone(),) * 2
        *to, rows = place or (*nowhere, torch.full((len(qkv),), -1))
        rotate(qkv, *rope, num_kv_heads, *to, rows)

    def silu_mul(gate_up: Any) -> Any:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def attend(q: Any, k: Any, v: Any, stage: Any, keys: Any, scale: Any) -> Any:
        heads = k.shape[1]
        k, v = (k, v) if keys.address is None else keys.address.split(1)
        paged = isinstance(keys, PagedKeys)
        bounds = keys.bounds if paged else keys.cu_seqlens_k
        where = (bounds, *((keys.block_table, keys.block_size) if paged else (bounds, 0)))
        return step(q, k, v, *where, keys.max_len, heads)

    for module in (pointwise, attention_calls):
        patch.setattr(module, "triton_runs", lambda device: True)
    patch.setattr(kernels, "rotate_", rotate_)
    patch.setattr(kernels, "silu_mul", silu_mul)
    ours = attention_backends.BACKENDS["triton"]
    patch.setitem(attention_backends.BACKENDS, "triton", replace(ours, run=attend))
