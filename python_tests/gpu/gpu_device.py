"""The device and the backend under test, and what the GPU tests need of a device.

In a dry run (ADSC_GPU_DRY_RUN=1) it is the CPU: a graph's replay runs the calls again, streams are
nothing, and sizes are small. It shows that the tests run, not that any kernel is right.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from types import ModuleType
from typing import Any

import torch
from cases.row_bits import bits, random_bits
from cases.run import tensors
from cases.segment_tables import FakeStage
from torch import Tensor

from adsc_kernels import StagePlan

DRY_RUN = os.environ.get("ADSC_GPU_DRY_RUN") == "1"
DEVICE = torch.device("cpu" if DRY_RUN else "cuda")
BACKEND = os.environ.get("ADSC_GPU_TEST_BACKEND", "cpu" if DRY_RUN else "cuda")
SENTINEL = 0xA5


def cases_here(name: str) -> ModuleType:
    """A module of cases, with the tensors that it makes at import on the device instead."""
    with DEVICE:
        return importlib.import_module(f"cases.{name}")


def to_device(stage: FakeStage) -> FakeStage:
    return replace(stage, segments=stage.segments.to(DEVICE))


def mapped(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """The same arguments or outputs with every tensor moved."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, (list, tuple)):
        parts = [mapped(part, move) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, StagePlan):  # not the plan behind it
        names = ["segments", "cu_seqlens", "cu_seqlens_in"]
    elif is_dataclass(value):
        names = [field.name for field in fields(value)]
    else:
        return value
    return replace(value, **{name: mapped(getattr(value, name), move) for name in names})


def run_here(op: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A Run of cases on the device: on a copy of each storage, so that views share it there too;
    what was written comes back."""
    storages: dict[int, tuple[Tensor, Tensor]] = {}

    def move(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.nbytes() == 0 or x.requires_grad:
            return x.to(DEVICE)
        if storage.data_ptr() not in storages:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            storages[storage.data_ptr()] = whole, whole.to(DEVICE)
        there = storages[storage.data_ptr()][1]
        there = there[: len(there) // x.itemsize * x.itemsize].view(x.dtype)
        return there.as_strided(x.shape, x.stride(), x.storage_offset())

    there = {name: mapped(value, move) for name, value in options.items()}
    out = op(*mapped(arguments, move), **there)
    for host, device in storages.values():
        if device is not host:  # which it is in a dry run
            host.copy_(device)
    return mapped(out, Tensor.cpu)


class Framed:
    """Rows with random bits on the device, `offset` elements into a buffer of sentinels.

    gap: elements between one row and the next; minus the row's own for one row, expanded.
    `rows` is the view to be handed over, `host` the same values on the CPU, dense.
    """

    def __init__(
        self,
        rows: int,
        trailing: tuple[int, ...],
        dtype: torch.dtype,
        *,
        gap: int = 0,
        offset: int = 0,
        seed: int = 0,
        values: Tensor | None = None,
    ) -> None:
        host = random_bits(rows, trailing, dtype, seed) if values is None else values.cpu()
        width, size = host.shape[1:].numel(), dtype.itemsize
        pitch = width + gap
        if pitch == 0:
            host = host[:1].expand(host.shape)
        count = (offset + rows * pitch + width + 64) * size
        before = torch.full((count,), SENTINEL, dtype=torch.uint8)
        if host.numel():
            flat = bits(host[: rows if pitch else 1]).reshape(-1, width * size)
            before.as_strided(flat.shape, (pitch * size, 1), offset * size).copy_(flat)
        self.host, self._before = host, before
        self._buffer = before.to(DEVICE)
        inner = torch.empty(1, *trailing).stride()[1:]
        self.rows = self._buffer.view(dtype).as_strided(host.shape, (pitch, *inner), offset)

    def unchanged(self) -> bool:
        """The rows, what is between them and what is around them."""
        return torch.equal(self._buffer.cpu(), self._before)


def poison(*sizes: int) -> None:
    """Leaves sentinels in the memory that the next outputs of so many bytes are likely to get."""
    kept = [
        torch.full((max(size, 1),), SENTINEL, dtype=torch.uint8, device=DEVICE) for size in sizes
    ]
    del kept


def capture(run: Callable[[], Any]) -> tuple[Callable[[], None], list[Tensor]]:
    """A graph of one call: its replay, and the outputs that each replay writes anew."""
    if DRY_RUN:
        outputs = tensors(run())

        def again() -> None:
            for out, new in zip(outputs, tensors(run()), strict=True):
                out.copy_(new)

        return again, outputs
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = tensors(run())
    return graph.replay, outputs


@contextmanager
def another_stream() -> Iterator[None]:
    """A stream that is not the default one; on leaving, the default one waits for it."""
    if DRY_RUN:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def hold_back(milliseconds: float) -> None:
    """Keeps the current stream busy, so that what was launched elsewhere overtakes it."""
    if not DRY_RUN:
        torch.cuda._sleep(int(milliseconds * 1.5e6))


def on_device(values: Sequence[Any] | Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.as_tensor(values, dtype=dtype).to(DEVICE)
