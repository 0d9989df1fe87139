"""CUDA graphs of functions of tensors: run, then captured, then replayed over other contents.

A graph reads and writes memory where it lay at capture, and knows the host's numbers of then. Its
key has to name both: what a graph was not made for has another key, and never meets it. What moves
from call to call is an input: numbers, rows, and addresses of what is too large to be copied.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from adsc_kernels import checks


@dataclass(frozen=True)
class Graph:
    """A captured call."""

    inputs: tuple[Tensor, ...]  # read anew by each replay
    output: Tensor  # written anew
    replay: Callable[[], None]
    lane: object = None  # where it was captured


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

        run uploads nothing, and reads no other tensors than its inputs, what lies where the key or
        an input says, and `tables`, which are kept for as long as the graph is.
        """
        device = inputs[0].device
        if not self.serve(device):
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
                    _forget_capture(device)
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

    def serve(self, device: torch.device) -> bool:
        """Whether a call now would be a graph in its turn."""
        return self.enabled and capturable(device)

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
    """Captures run over tensors like the inputs, without running it.

    Not by `torch.cuda.graph`, which waits for the device and gives all its free memory back.
    """
    device = inputs[0].device
    of = caller(device)
    lane = _lanes.get(of) or _Lane(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.stream(lane.stream):
        # What other threads do meanwhile (pin memory, free it) is no fault of this one.
        graph.capture_begin(pool=lane.pool, capture_error_mode="thread_local")
        try:
            # From the graph's own memory too, which gives nothing back in between.
            copies = tuple(torch.empty_like(x) for x in inputs)
            output = run(*copies)
        finally:
            graph.capture_end()
    _lanes[of] = lane  # which the graph keeps, and nothing else
    return Graph(copies, output, graph.replay, lane)


def _forget_capture(device: torch.device) -> None:
    """A capture that failed leaves the device's random numbers waiting for its end."""
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
        generator.graphsafe_set_state(generator.clone_state())


class _Lane:
    """A stream to capture on, and so a workspace for cuBLAS; and memory. The graphs of one caller
    share it, since they don't run at once, and it goes with the last of them: the allocator takes
    no pool again whose graphs are all gone."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()


_lanes: WeakValueDictionary[Caller, _Lane] = WeakValueDictionary()
