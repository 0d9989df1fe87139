"""The CPU worker: vLLM's own, which tells the model's stages where the images of a batch are."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from adsc_kernels.integrations.vllm.config import layouts_of
from adsc_kernels.integrations.vllm.layout import Layouts, RequestLayout


class RunnerRows:
    """The layouts of the requests in Model Runner V1's batch, in its order."""

    def __init__(self, runner: Any, layouts: Layouts) -> None:
        self._runner, self._layouts = runner, layouts
        # With the request itself: a name may come again, for another one.
        self._known: dict[str, tuple[Any, RequestLayout]] = {}

    def __call__(self) -> list[RequestLayout]:
        requests, names = self._runner.requests, self._runner.input_batch.req_ids
        if len(self._known) > len(requests):
            for name in self._known.keys() - requests.keys():
                del self._known[name]
        return [self._layout(name, requests[name]) for name in names]

    def _layout(self, name: str, request: Any) -> RequestLayout:
        known = self._known.get(name)
        if known is None or known[0] is not request:
            layout = self._layouts.of(request.prompt_token_ids, request.mm_features)
            known = self._known[name] = (request, layout)
        return known[1]


class AdscCPUWorker(CPUWorker):
    """CPUWorker with an ADSC model."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        super().load_model(load_dummy_weights=load_dummy_weights)
        batch = self.model_runner.get_model().adsc_batch
        batch.rows = RunnerRows(self.model_runner, layouts_of(self.vllm_config))
