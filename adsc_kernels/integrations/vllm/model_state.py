"""The model state of Model Runner V2, that of a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from adsc_kernels.integrations.vllm.config import layouts_of
from adsc_kernels.integrations.vllm.layout import RequestLayout

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.input_batch import InputBatch


class AdscModelState(DefaultModelState):
    """DefaultModelState that knows where each request's images are, and tells the stages."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._layouts = layouts_of(self.vllm_config)
        self._text = self._layouts.of_spans(())
        self._by_request: dict[str, RequestLayout] = {}

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        layout = self._layouts.of(new_req_data.prompt_token_ids, new_req_data.mm_features)
        self._by_request[new_req_data.req_id] = layout

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self._by_request.pop(req_id, None)

    def prepare_attn(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Metadata of all layers; the rows of vLLM's dummy batches have no images."""
        rows = [self._by_request.get(name, self._text) for name in input_batch.req_ids]
        self.model.adsc_batch.rows = lambda: rows
        return super().prepare_attn(input_batch, *args, **kwargs)
