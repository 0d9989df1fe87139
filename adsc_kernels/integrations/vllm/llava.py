"""LLaVA-1.5 with ADSC."""

from __future__ import annotations

from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from adsc_kernels.integrations.vllm.adapter import InStages, TextBehindDummies, TextBehindImage

# transformers 5 writes the CLIP tower without the "vision_model" that vLLM looks for.
FLAT_TOWER = WeightsMapper(
    orig_to_new_prefix={
        f"vision_tower.{part}.": f"vision_tower.vision_model.{part}."
        for part in ("embeddings", "encoder", "pre_layrnorm", "post_layernorm")
    }
)


class AdscLlavaProcessor(TextBehindImage, LlavaMultiModalProcessor):
    """LLaVA-1.5's own, with that check."""


class AdscLlavaDummyInputs(TextBehindDummies, LlavaDummyInputsBuilder):
    """LLaVA-1.5's own, with that text."""


@MULTIMODAL_REGISTRY.register_processor(
    AdscLlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=AdscLlavaDummyInputs
)
class AdscLlavaForConditionalGeneration(InStages, LlavaForConditionalGeneration):
    """LlavaForConditionalGeneration that drops vision tokens between the stages of its decoder."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | FLAT_TOWER
