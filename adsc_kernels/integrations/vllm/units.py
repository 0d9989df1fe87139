"""The layers of a stage as a unit of compilation, with an artifact of its own in vLLM's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import FunctionType
from typing import TYPE_CHECKING

from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import _model_hash_key, support_torch_compile
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, override_forward_context

from adsc_kernels.schedule import CompressionSchedule

if TYPE_CHECKING:
    from vllm.config import CompilationConfig, VllmConfig
    from vllm.sequence import IntermediateTensors

_DYNAMIC = {"positions": -1, "hidden_states": 0, "residual": 0, "deepstack": 0}


class StageLayers(nn.Module):
    """The layers of one stage.

    A unit of compilation of its own: inside one, the number of rows has a single symbol, and a
    branch on what the batch holds would be frozen as it was at the first trace.
    """

    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str = "", layers: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self,
        positions: Tensor,
        hidden_states: Tensor,
        residual: Tensor | None,
        deepstack: IntermediateTensors | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """deepstack: of Qwen3-VL's tower, to be added behind each of the first layers."""
        added = () if deepstack is None else tuple(deepstack.tensors.values())
        for n, layer in enumerate(self.layers):
            hidden_states, residual = layer(positions, hidden_states, residual)
            if n < len(added):
                hidden_states = hidden_states + added[n]
        return hidden_states, residual


def unit_class(schedule: CompressionSchedule, stage: int) -> type[StageLayers]:
    """StageLayers for one stage of one schedule, with a `forward` of its own.

    vLLM finds what it compiled by the configuration and by the name and the line of `forward`, and
    Dynamo by its code object. With those of another stage a unit would load that stage's artifact,
    and run its attention layers.
    """
    shared = StageLayers.forward
    name = f"StageLayers[{schedule}][{stage}]"
    code = shared.__code__.replace(co_name=f"forward_stage_{stage}")
    forward = FunctionType(code, shared.__globals__, code.co_name, shared.__defaults__)
    forward.__qualname__ = f"{name}.forward"
    unit = type(name, (StageLayers,), {"forward": forward, "__module__": __name__})
    return support_torch_compile(dynamic_arg_dims=_DYNAMIC)(unit)


def make_units(
    layers: Sequence[nn.Module], schedule: CompressionSchedule, vllm_config: VllmConfig
) -> list[StageLayers | None]:
    """The units of a decoder's stages; None for a stage without layers.

    Raises RuntimeError where vLLM would keep two of them as one artifact.
    """
    units: list[StageLayers | None] = []
    for s in range(schedule.num_stages):
        numbers = schedule.layers_of_stage(s)
        if not numbers:
            units.append(None)
            continue
        with set_model_tag(f"adsc_stage_{s}"):
            part = layers[numbers.start : numbers.stop]
            units.append(unit_class(schedule, s)(vllm_config=vllm_config, layers=part))
    keys = [_model_hash_key(unit.forward) for unit in units if unit is not None]
    if len(set(keys)) < len(keys):
        raise RuntimeError(
            f"compiled stages: expected an artifact for each of {len(keys)}, got {len(set(keys))}: "
            "this vLLM tells them apart by something else; --enforce-eager runs without"
        )
    return units


class PiecewiseGraphs:
    """Runs the units of later stages under vLLM's piecewise CUDA graphs.

    A graph is found by the batch's token count and reads where its inputs lay at capture. A stage
    with fewer rows than the batch therefore runs without. The others read from buffers that stay:
    of a unit's own outputs vLLM gives the memory back to the graphs' pool, where a graph of the
    next unit, captured behind it, may write before it reads.
    """

    def __init__(self, compilation_config: CompilationConfig) -> None:
        self._config = compilation_config
        self._buffers: dict[str, Tensor] = {}

    def run(
        self,
        unit: nn.Module,
        positions: Tensor,
        hidden: Tensor,
        residual: Tensor | None,
        narrow: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """narrow: rows were dropped before this stage."""
        context = get_forward_context()
        if context.cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            return unit(positions, hidden, residual)
        if narrow:
            without = replace(context, cudagraph_runtime_mode=CUDAGraphMode.NONE)
            with override_forward_context(without):
                return unit(positions, hidden, residual)
        hidden = self._stay("hidden", hidden)
        return unit(
            positions, hidden, None if residual is None else self._stay("residual", residual)
        )

    def _stay(self, name: str, rows: Tensor) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = rows.new_empty(
                self._config.max_cudagraph_capture_size, *rows.shape[1:]
            )
        return self._buffers[name][: len(rows)].copy_(rows)
