"""CUDA graphs of functions of tensors: run, then captured, then replayed over other contents.

A graph reads and writes memory where it lay at capture, and knows the host's numbers of then. Its
key has to name both: what a graph was not made for has another key, and never meets it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adsc_kernels import checks


@dataclass(frozen=True)
class Graph:
    """A captured call."""

    inputs: tuple[Tensor, ...]  # read anew by each replay
    output: Tensor  # written anew
    replay: Callable[[], None]
    run: Callable[..., Tensor]  # keeps alive what the graph reads beside its inputs


class Graphs:
    """At most `most` keys, those used last. `enabled`: False has everything run as it is."""

    def __init__(self, most: int = 8) -> None:
        self.most = checks.integer("most", most, 1)
        self.enabled = True
        self._known: OrderedDict[Hashable, Graph | None] = OrderedDict()

    def __call__(self, key: Hashable, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """run(*inputs): the first call of a key as it is, the second captured, then replayed.

        The output of a graph is overwritten by the next replay of any. run reads no other tensors
        than its inputs and what lies where the key says, and uploads nothing.
        """
        if not (self.enabled and capturable(inputs[0].device)):
            return run(*inputs)
        seen, graph = key in self._known, self._known.get(key)
        if not seen:
            # Kernels are compiled and libraries start in a call that isn't captured.
            output = run(*inputs)
        else:
            if graph is None:
                graph = capture(run, inputs)
            else:
                for mine, new in zip(graph.inputs, inputs, strict=True):
                    mine.copy_(new)
            graph.replay()
            output = graph.output
        self._known[key] = graph
        self._known.move_to_end(key)
        if len(self._known) > self.most:
            self._known.popitem(last=False)
        return output

    def __len__(self) -> int:
        return sum(graph is not None for graph in self._known.values())


def capturable(device: torch.device) -> bool:
    """Whether there are graphs on this device."""
    return device.type == "cuda"


def capture(run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Graph:
    """Captures run over copies of the inputs, without running it."""
    copies = tuple(x.clone() for x in inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(copies[0].device), torch.cuda.graph(graph, pool=_pool()):
        output = run(*copies)
    return Graph(copies, output, graph.replay, run)


_pools: dict[int, Any] = {}


def _pool() -> Any:
    """One for all graphs of a device: they don't run at once, and may share their memory."""
    index = torch.cuda.current_device()
    if index not in _pools:
        _pools[index] = torch.cuda.graph_pool_handle()
    return _pools[index]
