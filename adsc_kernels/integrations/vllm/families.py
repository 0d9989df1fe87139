"""The families of models: what the plug-in has to know of each, beside its module. No vLLM here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adsc_kernels.integrations.vllm.layout import Span
from adsc_kernels.integrations.vllm.spans import (
    SpanReader,
    llava_next_spans,
    llava_onevision_spans,
    llava_spans,
    qwen_vl_spans,
    square_image,
)

_PACKAGE = "adsc_kernels.integrations.vllm"


@dataclass(frozen=True)
class Family:
    """
    module: where the class of its architecture is, in this package.
    text, tower: `model_type` of the decoder and of the vision tower that it was written for.
    spans: from the model's config to what finds the vision tokens of a request.
    image: from the model's config to an image of common size, for groups and reports.
    reads_data: `spans` looks into what the processor made of an image, beside where it lies.
    class_token: the tower's first output is no patch of the image.
    """

    module: str
    text: tuple[str, ...]
    tower: tuple[str, ...]
    spans: Callable[[Any], SpanReader]
    image: Callable[[Any], Span]
    reads_data: bool = False
    class_token: bool = False


FAMILIES: dict[str, Family] = {
    "AdscLlavaForConditionalGeneration": Family(
        f"{_PACKAGE}.llava",
        ("llama",),
        ("clip_vision_model",),
        llava_spans,
        square_image,
        class_token=True,
    ),
    "AdscLlavaNextForConditionalGeneration": Family(
        f"{_PACKAGE}.llava_next",
        ("llama",),
        ("clip_vision_model",),
        llava_next_spans,
        square_image,
        class_token=True,
    ),
    "AdscLlavaOnevisionForConditionalGeneration": Family(
        f"{_PACKAGE}.llava_onevision",
        ("qwen2",),
        ("siglip_vision_model",),
        llava_onevision_spans,
        square_image,
    ),
    "AdscQwen2_5_VLForConditionalGeneration": Family(
        f"{_PACKAGE}.qwen2_5_vl",
        ("qwen2_5_vl_text",),
        ("qwen2_5_vl_vision", "qwen2_5_vl"),  # as transformers and as published checkpoints say
        qwen_vl_spans,
        lambda hf_config: (0, 576, 24, 24),  # images are of any size; LLaVA-1.5's, to compare
        reads_data=True,
    ),
    "AdscQwen3VLForConditionalGeneration": Family(
        f"{_PACKAGE}.qwen3_vl",
        ("qwen3_vl_text",),
        ("qwen3_vl_vision", "qwen3_vl"),
        qwen_vl_spans,
        lambda hf_config: (0, 576, 24, 24),
        reads_data=True,
    ),
}
