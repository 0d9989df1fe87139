"""The CPU worker: vLLM's own, which tells the model's stages where the images of a batch are."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from .config import layouts_of
from .layout import Layouts, RequestLayout


class RunnerRows:
    """The layouts of the requests in Model Runner V1's batch, in its order."""

    def __init__(self, runner: Any, layouts: Layouts) -> None:
        self._runner, self._layouts = runner, layouts
        self._by_request: dict[str, RequestLayout] = {}

    def __call__(self) -> list[RequestLayout]:
        requests = self._runner.requests
        for name in self._by_request.keys() - requests.keys():
            del self._by_request[name]
        return [self._layout(name) for name in self._runner.input_batch.req_ids]

    def _layout(self, name: str) -> RequestLayout:
        layout = self._by_request.get(name)
        if layout is None:
            request = self._runner.requests[name]
            layout = self._layouts.of(request.prompt_token_ids, request.mm_features)
            self._by_request[name] = layout
        return layout


class AdscCPUWorker(CPUWorker):
    """CPUWorker with an ADSC model."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        super().load_model(load_dummy_weights=load_dummy_weights)
        batch = self.model_runner.get_model().adsc_batch
        batch.rows = RunnerRows(self.model_runner, layouts_of(self.vllm_config))
