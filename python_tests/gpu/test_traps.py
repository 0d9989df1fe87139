"""ADSC_CHECK=1: a table or an index that points outside of the rows stops the kernel with a message.

Each in a process of its own, which a trap takes down.
"""
# ruff: noqa: E501 (tables of cases, one a line)

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_device import BACKEND, DEVICE

PRELUDE = f"""
import torch
import adsc_kernels as adsc
from adsc_kernels import ops
from cases.segment_tables import stage_of

torch.set_default_device("{DEVICE.type}")
x = torch.randn(64, 4096)
weight = torch.ones(4096)
cu_seqlens = torch.tensor([0, 40, 64], dtype=torch.int32)
def table(*rows, num_tokens=8): return stage_of(list(rows), num_tokens, 64)
def spans(*rows): return torch.tensor(rows, dtype=torch.int32)
def indices(*rows): return torch.tensor(rows)
cache = ops.DenseCache(torch.zeros(1, 10, 1, 4), None, keep_indices=indices(2, 5, 7), cu_kept=[0, 3], seq_lens=[10])
def compact(table, read_only=None, edit=False):
    # Two sequences of 8 rows, of which the last 4 are halved; two rows a block.
    plan = adsc.make_plan(adsc.CompressionSchedule.parse("1:1/2", num_layers=2), [0, 8, 16],
                          [(0, 4, 4), (1, 4, 4)], device=torch.get_default_device())
    pool = torch.zeros(8, 2, 1, 8)
    if read_only is not None: read_only = torch.tensor(read_only)
    ops.compact_paged_kv_(pool, None, torch.tensor(table), plan.stages[1], read_only_blocks=read_only, edit_table=edit)
"""
# What is called, and the argument that the message names. The first three are good.
CALLS = {
    "good table": ("ops.downsample(x, table([0, 0, 64, 8, 0, 0]))", ""),
    "good indices": ("ops.downsample_add_rms_norm(x, x, weight, keep_indices=indices(63, 0))", ""),
    "good layout": ("ops.rebuild_metadata(cu_seqlens, spans([0, 3, 30], [1, 0, 24]), '1/2')", ""),
    "source past x": ("ops.downsample(x, table([0, 1, 64, 64, 0, 0], num_tokens=64))", "segments"),
    "source before x": ("ops.downsample(x, table([0, -1, 8, 8, 0, 0]))", "segments"),
    "dst past the end": ("ops.downsample_many([x, x], table([0, 0, 4, 4, 0, 0], [9, 4, 4, 4, 0, 0]))", "segments"),
    "too few kept": ("ops.downsample(x, table([0, 0, 64, 4, 0, 0]))", "segments"),
    "pattern": ("ops.downsample(x, table([0, 0, 64, 8, 0, 7]))", "segments"),
    "index past x": ("ops.downsample(x, keep_indices=indices(0, 64))", "keep_indices"),
    "index negative": ("ops.downsample_many([x, weight[:64]], keep_indices=indices(-1))", "keep_indices"),
    "norm, index past x": ("ops.downsample_add_rms_norm(x, x, weight, keep_indices=indices(1 << 40))", "keep_indices"),
    "norm, source past x": ("ops.downsample_add_rms_norm(x, x, weight, table([0, 57, 8, 8, 0, 0]))", "segments"),
    "span leaves": ("ops.rebuild_metadata(cu_seqlens, spans([0, 30, 20]), '1/2')", "spans"),
    "bounds fall": ("ops.rebuild_metadata(torch.tensor([0, 9, 4], dtype=torch.int32), spans([0, 0, 4]), '1/2')", "cu_seqlens"),
    "step, source past x": ("ops.boundary_step(x, table([0, 57, 8, 8, 0, 0]), others=[x])", "segments"),
    "fused, good": ("ops.compress_step(x, cache, table([0, 0, 64, 8, 0, 0]))", ""),
    "fused, source past x": ("ops.compress_step(x, cache, table([0, 57, 8, 8, 0, 0]))", "segments"),
    "fused, span leaves": ("ops.compress_step(x, cache, layout=ops.BatchLayout(cu_seqlens, spans([1, 20, 10]), '1/2', num_tokens=64))", "spans"),
    "fused, rows of the cache": ("cache.keep_indices[1] = 10; ops.compress_step(x, cache, table([0, 0, 64, 8, 0, 0]))", "keep_indices"),
    "step, span leaves": ("ops.boundary_step(x, layout=ops.BatchLayout(cu_seqlens, spans([1, 20, 10]), '1/2', num_tokens=64))", "spans"),
    "good compaction": ("compact([[0, 1, 2, 3], [4, 5, 6, 7]])", ""),
    "good compaction, read-only": ("compact([[0, 1, 2, 3], [0, 1, 6, 7]], [0, 1, 3, 7, -1])", ""),
    "good compaction, edited": ("compact([[0, 1, 2, 3], [0, 1, 6, 7]], [0, 1, 3, 7], edit=True)", ""),
    "block outside": ("compact([[0, 1, 2, 3], [4, 5, 6, 8]])", "block_table"),
    "block shared": ("compact([[0, 1, 2, 3], [0, 5, 6, 7]])", "block_table"),
    "block shared, another read-only": ("compact([[0, 1, 2, 3], [0, 5, 6, 7]], [1])", "block_table"),
    "block twice": ("compact([[0, 1, 2, 2], [4, 5, 6, 7]])", "block_table"),
    "read-only written": ("compact([[0, 1, 2, 3], [4, 5, 6, 7]], [6])", "read_only_blocks"),
}  # fmt: skip


def code_of(call: str) -> str:
    return (
        f"{PRELUDE}\nwith adsc.backend('{BACKEND}'):\n    {call}\n"
        "if x.is_cuda:\n    torch.cuda.synchronize()\nprint('went through')"
    )


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[int, str]]:
    """Exit status and output of all, several at a time, in processes of their own."""
    path = os.pathsep.join([os.environ.get("PYTHONPATH", "."), "python_tests"])
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("trapped.py")],
        input=json.dumps({name: code_of(call) for name, (call, _) in CALLS.items()}),
        capture_output=True,
        text=True,
        env={**os.environ, "ADSC_CHECK": "1", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int, str]] = json.loads(done.stdout)
    return found


@pytest.mark.every_case
@pytest.mark.parametrize("name", CALLS)
def test_trap(name: str, outcomes: dict[str, tuple[int, str]]) -> None:
    status, said = outcomes[name]
    argument = CALLS[name][1]
    if argument:
        assert status != 0, said
        assert argument in said
        assert "went through" not in said
    else:
        assert status == 0, said
        assert "went through" in said
