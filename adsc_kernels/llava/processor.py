"""Text and pictures to what the decoder reads, and token ids back to text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 hides it above

from adsc_kernels import checks
from adsc_kernels.hub import read_json
from adsc_kernels.llava.config import LlavaConfig

# A picture is resized by its short side first: a thin enough strip would blow up to gigabytes.
MAX_ASPECT = 100


class Processor:
    """The checkpoint's tokenizer and image processor, both transformers' own."""

    def __init__(self, folder: Path, config: LlavaConfig) -> None:
        self.config = config
        for file in sorted(folder.glob("*config.json")):  # transformers reads whatever is there
            read_json(file)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            # The PIL one works without torchvision, and gives the same pixels with and without it.
            self.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        except Exception as error:  # these raise nearly anything
            raise ValueError(f"{folder}: tokenizer or image processor: {error}") from error

    def encode(self, prompt: str, num_images: int, *, begins: bool) -> tuple[list[int], list[int]]:
        """Token ids, each `<image>` expanded to a picture's rows, and where each picture starts.

        `begins`: the prompt opens a conversation, and gets the tokenizer's opening token.
        """
        if not prompt:
            raise ValueError("prompts: expected some text, got an empty one")
        ids: list[int] = []
        starts: list[int] = []
        for token in self.tokenizer(prompt, add_special_tokens=begins)["input_ids"]:
            is_image = token == self.config.image_token_id
            starts += [len(ids)] * is_image
            ids += [token] * (self.config.tokens_per_image if is_image else 1)
        if len(starts) != num_images:
            placeholder = self.tokenizer.convert_ids_to_tokens(self.config.image_token_id)
            got = f"{len(starts)} for {num_images} in {prompt[:60]!r}"
            raise ValueError(f"prompts: expected a {placeholder} for each image, got {got}")
        return ids, starts

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """float32 [N, 3, S, S]."""
        for image in checks.sequence("images", images, Image.Image, "PIL images"):
            if not all(image.size):
                raise ValueError(f"images: expected at least 1 x 1 pixels, got {image.size}")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"images: expected sides up to {MAX_ASPECT}:1, got {image.size}")
        shape = (len(images), 3, self.config.image_size, self.config.image_size)
        if not images:
            return torch.empty(shape)
        pixels = self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        if pixels.shape != shape:
            raise ValueError(f"image processor: expected {shape}, got {tuple(pixels.shape)}")
        return pixels

    def decode(self, ids: Sequence[int]) -> str:
        """Their text, without the special tokens."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
