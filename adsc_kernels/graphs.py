"""CUDA graphs of functions of tensors: run, then captured, then replayed over other contents.

A graph reads and writes memory where it lay at capture, and knows the host's numbers of then. Its
key has to name both: what a graph was not made for has another key, and never meets it.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adsc_kernels import checks


@dataclass(frozen=True)
class Graph:
    """A captured call."""

    inputs: tuple[Tensor, ...]  # read anew by each replay
    output: Tensor  # written anew
    replay: Callable[[], None]


class Graphs:
    """At most `most` keys, those used last. `enabled`: False has everything run as it is."""

    def __init__(self, most: int = 32) -> None:
        self.most = checks.integer("most", most, 1)
        self.enabled = True
        self._known: OrderedDict[Hashable, tuple[Graph, object] | None] = OrderedDict()

    def __call__(
        self, key: Hashable, run: Callable[..., Tensor], *inputs: Tensor, tables: object = ()
    ) -> Tensor:
        """run(*inputs): the first call of a key as it is, the second captured, then replayed.

        run uploads nothing, and reads no other tensors than its inputs, what lies where the key
        says, and `tables`, which are kept for as long as the graph is.
        """
        device = inputs[0].device
        if not (self.enabled and capturable(device)):
            return run(*inputs)
        key = (key, caller(device))
        seen, known = key in self._known, self._known.pop(key, None)
        if not seen:
            # Kernels are compiled and libraries start in a call that isn't captured. It is of
            # copies too, since Triton compiles for what the addresses are multiples of.
            output = run(*(x.clone() for x in inputs))
        else:
            if known is None:
                try:
                    known = capture(run, inputs), tables
                except RuntimeError as error:
                    self.enabled = False
                    warnings.warn(f"CUDA graphs are off from here on: {error}", stacklevel=2)
                    return run(*inputs)
            graph = known[0]
            for mine, new in zip(graph.inputs, inputs, strict=True):
                mine.copy_(new)
            graph.replay()
            output = graph.output.clone()  # the caller's own: the next replay writes over it
        self._known[key] = known
        if len(self._known) > self.most:
            self._known.popitem(last=False)
        return output

    def __len__(self) -> int:
        return sum(known is not None for known in self._known.values())


def capturable(device: torch.device) -> bool:
    """Whether a call now can be a graph: on a GPU, without a gradient, and in no other graph."""
    return (
        device.type == "cuda"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")  # whose casts of weights don't last
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


class Caller(NamedTuple):
    """Who calls: graphs of two of them may run at once, and share nothing."""

    thread: int
    device: torch.device
    stream: int
    inference: bool  # whether the inputs that a graph keeps are such as only this mode writes to


def caller(device: torch.device) -> Caller:
    """On whose behalf this runs."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return Caller(threading.get_ident(), device, stream, torch.is_inference_mode_enabled())


def capture(run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Graph:
    """Captures run over copies of the inputs, without running it.

    Not by `torch.cuda.graph`, which waits for the device and gives all its free memory back.
    """
    copies = tuple(x.clone() for x in inputs)
    device = copies[0].device
    stream, pool = _lane(caller(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.stream(stream):
        # What other threads do meanwhile (pin memory, free it) is no fault of this one.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            output = run(*copies)
        finally:
            graph.capture_end()
    return Graph(copies, output, graph.replay)


_lanes: dict[Caller, tuple[Any, Any, Any]] = {}


def _lane(of: Caller) -> tuple[Any, Any]:
    """A stream to capture on, and so a workspace for cuBLAS; and memory. Shared by the graphs of
    one caller, which don't run at once."""
    if of not in _lanes:
        stream, pool = torch.cuda.Stream(of.device), torch.cuda.graph_pool_handle()
        # The allocator takes no pool again whose graphs are all gone, so one of next to nothing
        # stays.
        keeper = torch.cuda.CUDAGraph()
        with torch.cuda.device(of.device), torch.cuda.stream(stream):
            torch.zeros(1, device=of.device)  # its kernel is loaded outside the capture
            keeper.capture_begin(pool=pool, capture_error_mode="thread_local")
            torch.zeros(1, device=of.device)
            keeper.capture_end()
        _lanes[of] = stream, pool, keeper
    return _lanes[of][:2]
