"""The survivors' picture: which pixels are veiled, and that they are the pixels the tower saw."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from adsc_kernels.llava import bundled_checkpoint
from adsc_kernels.picture import PANEL, Panel, Strip, draw, seen_box

RED, BLUE = (200, 30, 30), (30, 30, 200)


def painted(width: int, height: int) -> Image.Image:
    """A smooth picture in which every place has a colour of its own."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


@pytest.mark.parametrize("size", [(48, 48), (200, 96), (96, 301), (30, 17), (1200, 900)])
def test_box_is_what_the_processor_shows_the_tower(size: tuple[int, int]) -> None:
    processor = AutoImageProcessor.from_pretrained(bundled_checkpoint(), backend="pil")
    image = painted(*size)
    pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
    mean, std = (np.array(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    seen = (pixels * std + mean) * 255
    side = seen.shape[-1]
    ours = image.crop(seen_box(size, processor)).resize((side, side), Image.Resampling.BICUBIC)
    error = np.abs(np.asarray(ours, np.float64).transpose(2, 0, 1) - seen)
    assert error.mean() < 255 / side  # within a pixel of the tower's view


def test_box_of_the_other_processors() -> None:
    fixed = SimpleNamespace(do_resize=True, size={"height": 48, "width": 48}, do_center_crop=False)
    assert seen_box((90, 60), fixed) == (0, 0, 90, 60)  # squeezed, nothing cut off
    padded = SimpleNamespace(
        do_resize=False, do_center_crop=True, crop_size={"height": 50, "width": 40}
    )
    assert seen_box((20, 90), padded) == (-10, 20, 30, 70)


def test_survivors_are_clear_and_the_rest_is_veiled() -> None:
    image = Image.new("RGB", (4, 4), RED)
    image.paste(BLUE, (2, 0, 4, 2))
    kept = frozenset({1})  # in reading order: top right
    strip = Strip(image, (0, 0, 4, 4), (2, 2), [Panel("s", kept)])
    drawn = draw([strip], "title")
    panel = drawn.crop((28, 56, 28 + PANEL, 56 + PANEL))
    quarter, three = PANEL // 4, 3 * PANEL // 4
    assert panel.getpixel((three, quarter)) == BLUE
    for corner in ((quarter, quarter), (quarter, three), (three, three)):
        assert sum(abs(a - b) for a, b in zip(panel.getpixel(corner), RED, strict=True)) > 200


def test_nothing_dropped_is_the_picture_itself() -> None:
    image = painted(48, 48)
    strip = Strip(image, (0, 0, 48, 48), (24, 24), [Panel("all", frozenset(range(576)))])
    panel = draw([strip], "t").crop((28, 56, 28 + PANEL, 56 + PANEL))
    assert np.array_equal(panel, image.resize((PANEL, PANEL), Image.Resampling.NEAREST))


def test_a_row_for_each_picture_and_the_whole_where_a_part_was_seen() -> None:
    whole = Strip(painted(48, 48), (0, 0, 48, 48), (2, 2), [Panel("s", frozenset({0}))] * 3)
    cropped = Strip(painted(80, 40), (20, 0, 60, 40), (2, 2), [Panel("s", frozenset())] * 3)
    one, two = draw([whole], "t"), draw([whole, cropped], "t" * 500)
    assert two.width == one.width + PANEL + 28  # the frame around what was seen
    assert two.height > 2 * PANEL


def test_bad_input() -> None:
    strip = Strip(painted(8, 8), (0, 0, 8, 8), (2, 2), [Panel("s", frozenset({4}))])
    with pytest.raises(ValueError, match=r"0\.\.3"):
        draw([strip], "t")
    with pytest.raises(ValueError, match="strips"):
        draw([], "t")
