"""CUDA graphs, on a CPU: what was recorded at capture is done again, on the same memory.

Every op that a captured call makes is kept with its arguments as they were: tensors where they lie,
and the host's numbers as they are then. A replay calls those ops once more and writes what they
return where it was returned first. Whatever the call did beside ops, it does no more: a length that
the host counted stays what it was, and so does an upload. Capturing itself runs ops here, on copies
of the inputs, but a graph must not depend on that: what it wrote to the cache is undone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adsc_kernels.graphs import Graph


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
        with recorder:
            output = run(*copies)
        recorder.undo()
        output.fill_(torch.nan)  # nothing is there before the first replay

        def replay() -> None:
            self.replays += 1
            recorder.replay()

        self.made.append(Graph(copies, output, replay))
        return self.made[-1]
