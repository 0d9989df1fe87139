"""LLaVA-OneVision with ADSC: tiles as LLaVA-NeXT's, fewer where they are many, and videos."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from adsc_kernels.integrations.vllm.adapter import InStages, TextBehindDummies
from adsc_kernels.integrations.vllm.llava import FLAT_TOWER
from adsc_kernels.integrations.vllm.llava_next import NewlineTokens


class AdscLlavaOnevisionProcessor(NewlineTokens, LlavaOnevisionMultiModalProcessor):
    """LLaVA-OneVision's own, with newline tokens in images."""


class AdscLlavaOnevisionDummyInputs(TextBehindDummies, LlavaOnevisionDummyInputsBuilder):
    """LLaVA-OneVision's own, with text behind its images."""


@MULTIMODAL_REGISTRY.register_processor(
    AdscLlavaOnevisionProcessor,
    info=LlavaOnevisionProcessingInfo,
    dummy_inputs=AdscLlavaOnevisionDummyInputs,
)
class AdscLlavaOnevisionForConditionalGeneration(InStages, LlavaOnevisionForConditionalGeneration):
    """LlavaOnevisionForConditionalGeneration that drops vision tokens between decoder stages."""

    hf_to_vllm_mapper = LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | FLAT_TOWER

    def _process_video_pixels(self, inputs: Any) -> list[Tensor]:
        """vLLM's [tokens, hidden] of each video: where a step has videos of several lengths, it
        leaves a dimension in front, by which its engine would end."""
        return [video.flatten(0, -2) for video in super()._process_video_pixels(inputs)]
