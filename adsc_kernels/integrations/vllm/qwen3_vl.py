"""Qwen3-VL with ADSC: as Qwen2.5-VL; its tower adds to the first layers too, all of stage 0."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from adsc_kernels.integrations.vllm.adapter import InStages, TextBehindDummies, TextBehindImage


class AdscQwen3VLProcessor(TextBehindImage, Qwen3VLMultiModalProcessor):
    """Qwen3-VL's own, with that check."""


class AdscQwen3VLDummyInputs(TextBehindDummies, Qwen3VLDummyInputsBuilder):
    """Qwen3-VL's own, with that text."""


@MULTIMODAL_REGISTRY.register_processor(
    AdscQwen3VLProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=AdscQwen3VLDummyInputs
)
class AdscQwen3VLForConditionalGeneration(InStages, Qwen3VLForConditionalGeneration):
    """Qwen3VLForConditionalGeneration that drops vision tokens between its decoder's stages."""
