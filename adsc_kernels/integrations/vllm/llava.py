"""LLaVA-1.5 with ADSC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from .metadata import Batch
from .request_check import ENDS_IN_IMAGE

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.multimodal.processing import ProcessorInputs


# transformers 5 writes the CLIP tower without the "vision_model" that vLLM looks for.
FLAT_TOWER = WeightsMapper(
    orig_to_new_prefix={
        f"vision_tower.{part}.": f"vision_tower.vision_model.{part}."
        for part in ("embeddings", "encoder", "pre_layrnorm", "post_layernorm")
    }
)


class TextBehindImage:
    """For a multimodal processor: refuses a prompt that ends in an image.

    Before anything is processed: the caches of processed images, on both sides of the engine, take
    every image that was processed for one that arrived.
    """

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        image_id = self.info.get_hf_config().image_token_index  # type: ignore[attr-defined]
        if list(inputs.prompt[-1:]) == [image_id]:
            raise VLLMValidationError(ENDS_IN_IMAGE, parameter="prompt")
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]


class TextBehindDummies:
    """For a builder of dummy inputs: some text behind the images of a profiling run."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return super().get_dummy_text(mm_counts) + "\n."  # type: ignore[misc]


class AdscLlavaProcessor(TextBehindImage, LlavaMultiModalProcessor):
    """LLaVA-1.5's own, with that check."""


class AdscLlavaDummyInputs(TextBehindDummies, LlavaDummyInputsBuilder):
    """LLaVA-1.5's own, with that text."""


class AdscLanguageModel:
    """For a LLaVA: has vLLM build the decoder in stages, and cuts them."""

    adsc_batch: Batch

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        vllm_config.model_config.hf_config.text_config.architectures = ["AdscLlamaForCausalLM"]
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.adsc_batch = self.language_model.model.set_stages(vllm_config)  # type: ignore[attr-defined]

    @staticmethod
    def get_model_state_cls() -> type:
        """Model Runner V2 asks for it."""
        from .model_state import AdscModelState

        return AdscModelState


@MULTIMODAL_REGISTRY.register_processor(
    AdscLlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=AdscLlavaDummyInputs
)
class AdscLlavaForConditionalGeneration(AdscLanguageModel, LlavaForConditionalGeneration):
    """LlavaForConditionalGeneration that drops vision tokens between the stages of its decoder."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | FLAT_TOWER
