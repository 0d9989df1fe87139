"""Text and pictures to what the decoder reads, and token ids back to text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from .config import LlavaConfig

# A picture is resized by its short side first: a thin enough strip would blow up to gigabytes.
MAX_ASPECT = 100


def load_image(path: str | Path) -> Image.Image:
    """A picture file as 8-bit RGB, turned upright by its EXIF orientation.

    Raises: FileNotFoundError; ValueError where it is no picture, is damaged or cut short, is so large that
        it may be a decompression bomb, or has more than 8 bits a channel.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"image {path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):  # Pillow would clip, not scale, these
                    raise ValueError(f"mode {image.mode}; 8 bits a channel are expected")
                return ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"image {path}: too large ({error})") from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise ValueError(f"image {path}: can't be read ({error})") from error


class Processor:
    """The checkpoint's tokenizer and image processor, both transformers' own."""

    def __init__(self, folder: Path, config: LlavaConfig) -> None:
        self.config = config
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            # The PIL one works without torchvision, and gives the same pixels with and without it.
            self.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder}: tokenizer or image processor: {error}") from error

    def encode(self, prompt: str, num_images: int, *, begins: bool) -> tuple[list[int], list[int]]:
        """Token ids with every `<image>` expanded to the rows of one picture, and where those rows start.

        `begins`: the prompt opens a conversation, so that it gets the tokenizer's opening token.

        Raises: ValueError for an empty prompt, and where placeholders and pictures differ in number.
        """
        if not prompt:
            raise ValueError("a prompt is empty")
        ids = self.tokenizer(prompt, add_special_tokens=begins)["input_ids"]
        image = self.config.image_token_id
        if ids.count(image) != num_images:
            raise ValueError(
                f"the prompt {prompt[:60]!r} has {ids.count(image)} image placeholders "
                f"({self.tokenizer.convert_ids_to_tokens(image)}) for {num_images} pictures"
            )
        expanded: list[int] = []
        starts: list[int] = []
        for token in ids:
            if token == image:
                starts.append(len(expanded))
                expanded += [image] * self.config.tokens_per_image
            else:
                expanded.append(token)
        return expanded, starts

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """float32 [N, 3, S, S]. Raises: TypeError, ValueError for what is no usable picture."""
        for image in images:
            if not isinstance(image, Image.Image):
                raise TypeError(f"images must be PIL images, got {type(image).__name__}")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"an image of {image.size} pixels: sides beyond {MAX_ASPECT}:1")
        pixels: Tensor = self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        expected = (len(images), 3, self.config.image_size, self.config.image_size)
        if pixels.shape != expected:
            raise ValueError(f"the image processor must give {expected}, got {tuple(pixels.shape)}")
        return pixels.to(torch.float32)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class TextStream:
    """Text of a growing list of ids, piece by piece: a piece is held back until its characters are whole."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._ids: list[int] = []
        self._shown = 0  # ids whose text is out
        self._context = 0  # decoding starts here: a piece may depend on the one before it
        self.text = ""

    def push(self, token: int) -> str:
        self._ids.append(token)
        before = self._processor.decode(self._ids[self._context : self._shown])
        now = self._processor.decode(self._ids[self._context :])
        if now.endswith("\N{REPLACEMENT CHARACTER}"):  # a character of several tokens, not all there
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        piece = now[len(before) :]
        self.text += piece
        return piece
