"""LLaVA-NeXT with ADSC: several tiles, and newline tokens between their rows that always stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import EmbeddingItems, ImageProcessorItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate

from adsc_kernels.integrations.vllm.adapter import InStages, TextBehindDummies, TextBehindImage
from adsc_kernels.integrations.vllm.llava import FLAT_TOWER
from adsc_kernels.integrations.vllm.spans import newline_token_id

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalKwargsItems
    from vllm.multimodal.parse import MultiModalDataItems

    from adsc_kernels.schedule import CompressionSchedule


class NewlineTokens(TextBehindImage):
    """For the processor of a model with tiles: newline embeddings have a token of their own in the
    prompt, by which `spans.llava_next_spans` sees the shape of an image."""

    info: LlavaNextProcessingInfo

    def refuse(self, items: MultiModalDataItems, schedule: CompressionSchedule) -> None:
        for modality, some in items.items():
            if isinstance(some, EmbeddingItems):
                expected = f"{modality}s: expected pixels, got embeddings, whose shape is unknown"
                raise VLLMValidationError(expected, parameter=f"{modality}_embeds")

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        """vLLM's own, but that of images."""
        updates = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items, hf_processor_mm_kwargs, out_mm_kwargs
        )
        image_id = self.info.get_hf_config().image_token_index

        def tokens(number: int) -> list[int]:
            size = mm_items.get_items("image", ImageProcessorItems).get_image_size(number)
            return self._tokens(size.width, size.height)

        images = PromptReplacement(modality="image", target=[image_id], replacement=tokens)
        return [images, *(update for update in updates if update.modality != "image")]

    def _tokens(self, width: int, height: int) -> list[int]:
        """Of an image of that size: the overview, then rows of the tiles, each with a newline."""
        config, tower = self.info.get_hf_config(), self.info.get_vision_encoder_info()
        image_id, newline_id = config.image_token_index, newline_token_id(config)
        rows, columns = get_anyres_image_grid_shape(
            (height, width), config.image_grid_pinpoints, tower.get_image_size()
        )
        tiles, newlines = self.info._get_num_unpadded_features(
            original_height=height,
            original_width=width,
            npatches=tower.get_patch_grid_length(),
            num_patch_height=rows,
            num_patch_width=columns,
        )
        total = self.info.get_num_image_tokens(image_width=width, image_height=height)
        # Of a picture that is a mere line no row may be left, or rows of newlines only.
        row = [image_id] * (tiles // max(newlines, 1)) + [newline_id]
        return [image_id] * (total - tiles - newlines) + row * newlines


class AdscLlavaNextProcessor(NewlineTokens, LlavaNextMultiModalProcessor):
    """LLaVA-NeXT's own, with those tokens."""


class AdscLlavaNextDummyInputs(TextBehindDummies, LlavaDummyInputsBuilder):
    """LLaVA-NeXT's own, with text behind its images."""


@MULTIMODAL_REGISTRY.register_processor(
    AdscLlavaNextProcessor, info=LlavaNextProcessingInfo, dummy_inputs=AdscLlavaNextDummyInputs
)
class AdscLlavaNextForConditionalGeneration(InStages, LlavaNextForConditionalGeneration):
    """LlavaNextForConditionalGeneration that drops vision tokens between the decoder's stages."""

    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | FLAT_TOWER
