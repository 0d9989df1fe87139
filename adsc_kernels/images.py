"""Reading picture files: what is no sound picture is refused, with the reason."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, ImageOps

from adsc_kernels import checks


def load_image(path: str | Path) -> Image.Image:
    """A picture file as 8-bit RGB, turned upright by its EXIF orientation.

    Raises FileNotFoundError; ValueError where the file is no picture, is damaged or cut short, is
    so large that it may be a decompression bomb, or has more than 8 bits a channel.
    """
    path = checks.path("path", path)
    if not path.is_file():
        raise FileNotFoundError(f"image {path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):  # Pillow would clip these, not scale them
                    raise ValueError(f"expected 8 bits a channel, got mode {image.mode}")
                upright = ImageOps.exif_transpose(image).convert("RGB")
                if not all(upright.size):
                    raise ValueError(f"expected at least 1 x 1 pixels, got {upright.size}")
                return upright
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"image {path}: too large ({error})") from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise ValueError(f"image {path}: can't be read ({error})") from error
