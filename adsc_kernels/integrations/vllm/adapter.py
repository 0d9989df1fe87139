"""What the module of a family is made of, beside vLLM's own classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError

from adsc_kernels.integrations.vllm.metadata import Batch
from adsc_kernels.integrations.vllm.model import cut_into_stages
from adsc_kernels.integrations.vllm.request_check import ENDS_IN_IMAGE
from adsc_kernels.schedule import CompressionSchedule

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.multimodal.parse import MultiModalDataItems
    from vllm.multimodal.processing import ProcessorInputs


class TextBehindImage:
    """For a multimodal processor: refuses a prompt that ends in an image or has no place for one,
    which vLLM answers with an internal error, and what `refuse` does.

    Before anything is processed: the caches of processed images, on both sides of the engine, take
    every image that was processed for one that arrived.
    """

    def refuse(self, items: MultiModalDataItems, schedule: CompressionSchedule) -> None:
        """Raises VLLMValidationError where a family can't place some of a request's images."""

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        config = self.info.get_hf_config()  # type: ignore[attr-defined]
        places = {"image": config.image_token_id, "video": getattr(config, "video_token_id", None)}
        if set(places.values()).intersection(inputs.prompt[-1:]):
            raise VLLMValidationError(ENDS_IN_IMAGE, parameter="prompt")
        for modality, count in inputs.mm_data_items.get_all_counts().items():
            got = inputs.prompt.count(places[modality])
            if got < count:
                expected = f"prompt: expected a place for each {modality} of {count}, got {got}"
                raise VLLMValidationError(expected, parameter="prompt")
        self.refuse(inputs.mm_data_items, CompressionSchedule.from_dict(config.adsc_schedule))
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]


class TextBehindDummies:
    """For a builder of dummy inputs: some text behind the images of a profiling run."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return super().get_dummy_text(mm_counts) + "\n."  # type: ignore[misc]


class InStages:
    """For a multimodal model: its decoder in stages, of which vLLM built the layers."""

    adsc_batch: Batch

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        decoder = self.language_model.model  # type: ignore[attr-defined]
        self.adsc_batch = cut_into_stages(decoder, vllm_config)

    @staticmethod
    def get_model_state_cls() -> type:
        """Model Runner V2 asks for it."""
        from adsc_kernels.integrations.vllm.model_state import AdscModelState

        return AdscModelState
