"""LLaVA-1.5 with ADSC."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems

from adsc_kernels.integrations.vllm.adapter import InStages, TextBehindDummies, TextBehindImage
from adsc_kernels.integrations.vllm.spans import square_image

if TYPE_CHECKING:
    from vllm.multimodal.parse import MultiModalDataItems

    from adsc_kernels.schedule import CompressionSchedule

# transformers 5 writes the CLIP tower without the "vision_model" that vLLM looks for.
FLAT_TOWER = WeightsMapper(
    orig_to_new_prefix={
        f"vision_tower.{part}.": f"vision_tower.vision_model.{part}."
        for part in ("embeddings", "encoder", "pre_layrnorm", "post_layernorm")
    }
)


class AdscLlavaProcessor(TextBehindImage, LlavaMultiModalProcessor):
    """LLaVA-1.5's own, with that check, and one that embeddings are a grid where rows and columns
    are dropped."""

    def refuse(self, items: MultiModalDataItems, schedule: CompressionSchedule) -> None:
        if schedule.pattern != "grid" or "image" not in items:
            return
        images = items.get_items("image", (ImageEmbeddingItems, ImageProcessorItems))
        expected = square_image(self.info.get_hf_config())[1]
        if isinstance(images, ImageProcessorItems):
            return
        for number in range(len(images)):
            got = images.get_feature_size(number)
            if got != expected:
                raise VLLMValidationError(
                    f"image {number}: expected embeddings of {expected} tokens with the pattern "
                    f"'grid', got {got}",
                    parameter="image_embeds",
                )


class AdscLlavaDummyInputs(TextBehindDummies, LlavaDummyInputsBuilder):
    """LLaVA-1.5's own, with that text."""


@MULTIMODAL_REGISTRY.register_processor(
    AdscLlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=AdscLlavaDummyInputs
)
class AdscLlavaForConditionalGeneration(InStages, LlavaForConditionalGeneration):
    """LlavaForConditionalGeneration that drops vision tokens between the stages of its decoder."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | FLAT_TOWER
