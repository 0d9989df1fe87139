"""Where the vision tokens of a request are, by model family: what an adapter has to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from adsc_kernels.errors import UnsupportedError
from adsc_kernels.integrations.vllm.layout import Span

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

# Prompt token ids and the request's images to spans, in order of start.
SpanReader = Callable[[Sequence[int], "Sequence[MultiModalFeatureSpec]"], tuple[Span, ...]]


def llava_spans(hf_config: Any) -> SpanReader:
    """LLaVA-1.5: an image is one run of tokens, a square grid unless it has a class token."""
    vision = hf_config.vision_config
    side = vision.image_size // vision.patch_size

    def read(
        prompt_token_ids: Sequence[int], features: Sequence[MultiModalFeatureSpec]
    ) -> tuple[Span, ...]:
        return tuple(
            (start, length, side, side) if length == side * side else (start, length)
            for start, length in placeholders(features)
        )

    return read


def llava_next_spans(hf_config: Any) -> SpanReader:
    """LLaVA-NeXT: an overview, then rows of tiles that each end with a newline token.

    Our processor writes those as a token of their own (`newline_token_id`), so that the prompt
    alone tells the shape. Newlines stay, as all text does.
    """
    vision, image_id = hf_config.vision_config, hf_config.image_token_index
    side = vision.image_size // vision.patch_size

    def read(
        prompt_token_ids: Sequence[int], features: Sequence[MultiModalFeatureSpec]
    ) -> tuple[Span, ...]:
        spans: list[Span] = []
        for start, length in placeholders(features):
            overview = side * side
            spans.append((start, overview, side, side))
            first, rest, width = start + overview, length - overview, 0
            while width < rest and prompt_token_ids[first + width] == image_id:
                width += 1
            if width:  # of a picture that is a mere line only newlines may be left, or nothing
                spans.append((first, rest, rest // (width + 1), width))
        return tuple(spans)

    return read


def llava_onevision_spans(hf_config: Any) -> SpanReader:
    """LLaVA-OneVision: images as LLaVA-NeXT's, and videos: frames of half the side, rounded up,
    and one newline behind the last, which stays."""
    read_images = llava_next_spans(hf_config)
    side = -(-square_image(hf_config)[2] // 2)
    frame = side * side

    def read(
        prompt_token_ids: Sequence[int], features: Sequence[MultiModalFeatureSpec]
    ) -> tuple[Span, ...]:
        videos = [feature.mm_position for feature in features if feature.modality == "video"]
        images = [feature for feature in features if feature.modality != "video"]
        spans = list(read_images(prompt_token_ids, images))
        for video in videos:
            frames, rest = divmod(video.length - 1, frame)
            if rest:
                expected = f"a video: expected frames of {frame} tokens and a newline"
                raise UnsupportedError(f"{expected}, got {video.length} tokens")
            spans += [(video.offset + n * frame, frame, side, side) for n in range(frames)]
        return tuple(sorted(spans))

    return read


def newline_token_id(hf_config: Any) -> int:
    """Stands for a newline embedding in a prompt: any id but the image's; its text is not used."""
    return 1 if hf_config.image_token_index == 0 else 0


def qwen_vl_spans(hf_config: Any) -> SpanReader:
    """Qwen2.5-VL, Qwen3-VL: an image is a grid of its own size, a video one for each of its frames,
    between which Qwen3-VL writes their times.

    The prompt tells how long they are, but not how wide: that is with what the processor made of
    them.
    """
    merge = hf_config.vision_config.spatial_merge_size
    pads = {"image": hf_config.image_token_id, "video": hf_config.video_token_id}

    def read(
        prompt_token_ids: Sequence[int], features: Sequence[MultiModalFeatureSpec]
    ) -> tuple[Span, ...]:
        spans: list[Span] = []
        for feature in sorted(features, key=lambda feature: feature.mm_position.offset):
            start, data = feature.mm_position.offset, feature.data
            frames, rows, columns = data[f"{feature.modality}_grid_thw"].data.tolist()
            height, width = rows // merge, columns // merge
            for _ in range(frames):
                start = prompt_token_ids.index(pads[feature.modality], start)
                spans.append((start, height * width, height, width))
                start += height * width
        return tuple(spans)

    return read


def square_image(hf_config: Any) -> Span:
    """The one size that the tower of a LLaVA takes."""
    vision = hf_config.vision_config
    side = vision.image_size // vision.patch_size
    return (0, side * side, side, side)


def placeholders(features: Sequence[MultiModalFeatureSpec]) -> list[tuple[int, int]]:
    """(start, length) of each image, sorted."""
    found = []
    for feature in features:
        where = feature.mm_position
        if feature.modality != "image":
            raise UnsupportedError(f"modality: expected images, got {feature.modality}")
        if where.is_embed is not None and not bool(where.is_embed.all()):
            raise UnsupportedError("mm_position: expected images without text between their tokens")
        found.append((where.offset, where.length))
    return sorted(found)
