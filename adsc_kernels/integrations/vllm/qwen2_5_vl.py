"""Qwen2.5-VL with ADSC: images and videos of any size, positions in time, height and width."""

from __future__ import annotations

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from adsc_kernels.integrations.vllm.adapter import InStages, TextBehindDummies, TextBehindImage


class AdscQwen2_5_VLProcessor(TextBehindImage, Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL's own, with that check."""


class AdscQwen2_5_VLDummyInputs(TextBehindDummies, Qwen2_5_VLDummyInputsBuilder):
    """Qwen2.5-VL's own, with that text."""


@MULTIMODAL_REGISTRY.register_processor(
    AdscQwen2_5_VLProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=AdscQwen2_5_VLDummyInputs
)
class AdscQwen2_5_VLForConditionalGeneration(InStages, Qwen2_5_VLForConditionalGeneration):
    """Qwen2_5_VLForConditionalGeneration that drops vision tokens between its decoder's stages."""
