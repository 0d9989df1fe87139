"""The picture of what a schedule keeps: one panel per stage, dropped patches veiled and hatched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

PANEL = 360  # the least side of a panel, in pixels; rounded up to whole patches
_GAP = 28
_CAPTION = 30
_TITLE = 56
_HEADING = 30
_PAPER = (250, 250, 248)
_INK = (32, 36, 44)
_MUTED = (112, 118, 128)
_VEIL = (222, 225, 230)
_HATCH = (140, 147, 160)
_ACCENT = (232, 112, 32)
_VEIL_STRENGTH = 0.82


@dataclass(frozen=True)
class Panel:
    """One stage: its caption, and the patches (row-major indices) that are still there."""

    caption: str
    kept: frozenset[int]


@dataclass(frozen=True)
class Strip:
    """One image with its panels. ``box`` is the part that the tower saw, as ``seen_box`` gives."""

    image: Image.Image
    box: tuple[int, int, int, int]
    grid: tuple[int, int]  # patches down, patches across
    panels: Sequence[Panel]
    heading: str = ""  # above the panels


def seen_box(size: tuple[int, int], image_processor: Any) -> tuple[int, int, int, int]:
    """The (left, top, right, bottom) of an image of ``size`` (width, height) that the tower sees.

    ``image_processor`` is a transformers image processor of CLIP's kind: it resizes, to a fixed
    size or by the shortest edge, and may then crop the centre. The box leaves the image where the
    processor pads.
    """
    width, height = size
    scale_x = scale_y = 1.0
    if getattr(image_processor, "do_resize", False):
        target = dict(image_processor.size)
        if target.get("shortest_edge"):
            scale_x = scale_y = target["shortest_edge"] / min(size)
        else:
            scale_x, scale_y = target["width"] / width, target["height"] / height
    if not getattr(image_processor, "do_center_crop", False):
        return (0, 0, width, height)
    crop = dict(image_processor.crop_size)
    half_x, half_y = crop["width"] / scale_x / 2, crop["height"] / scale_y / 2
    return (
        round(width / 2 - half_x),
        round(height / 2 - half_y),
        round(width / 2 + half_x),
        round(height / 2 + half_y),
    )


def centre_box(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest box in the middle of an image of ``size`` that has the grid's proportions."""
    (width, height), (down, across) = size, grid
    scale = min(width / across, height / down)
    left, top = (width - scale * across) / 2, (height - scale * down) / 2
    return (round(left), round(top), round(width - left), round(height - top))


def draw(strips: Sequence[Strip], title: str) -> Image.Image:
    """Draw one row of panels per strip, below a title.

    Where the tower saw only a part of a picture, the whole comes first, with that part framed.

    Raises ``ValueError`` where a kept patch lies outside the grid or there is nothing to draw.
    """
    rows = [_row(strip) for strip in strips]
    if not rows:
        raise ValueError("strips: expected at least one, got none")
    canvas = Image.new(
        "RGB",
        (max(row.width for row in rows), _TITLE + sum(row.height for row in rows)),
        _PAPER,
    )
    text = _fit(title, canvas.width - 2 * _GAP, 20)
    ImageDraw.Draw(canvas).text((_GAP, 16), text, fill=_INK, font=_font(20))
    top = _TITLE
    for row in rows:
        canvas.paste(row, (0, top))
        top += row.height
    return canvas


def _row(strip: Strip) -> Image.Image:
    pictures = [_panel(strip, panel) for panel in strip.panels]
    captions = [panel.caption for panel in strip.panels]
    width, height = strip.image.size
    if strip.box != (0, 0, width, height):
        pictures.insert(0, _whole(strip))
        captions.insert(0, f"picture, {width} x {height}")
    side = max(picture.height for picture in pictures)
    top = _HEADING if strip.heading else 0
    row = Image.new(
        "RGB",
        (sum(p.width + _GAP for p in pictures) + _GAP, top + side + _CAPTION + _GAP),
        _PAPER,
    )
    draw_on = ImageDraw.Draw(row)
    if strip.heading:
        draw_on.text((_GAP, 2), _fit(strip.heading, row.width - 2 * _GAP, 17), _INK, _font(17))
    left = _GAP
    for picture, caption in zip(pictures, captions, strict=True):
        row.paste(picture, (left, top + (side - picture.height) // 2))
        label = _fit(caption, picture.width + _GAP - 4, 15)
        draw_on.text((left, top + side + 8), label, fill=_MUTED, font=_font(15))
        left += picture.width + _GAP
    return row


def _whole(strip: Strip) -> Image.Image:
    """The picture as it was given, with the part that the tower saw framed."""
    width, height = strip.image.size
    scale = _panel_size(strip.grid)[1] / max(height, width)
    picture = _enlarge(strip.image, (max(1, round(width * scale)), max(1, round(height * scale))))
    left, top, right, bottom = (round(edge * scale) for edge in strip.box)
    frame = (left, top, right - 1, bottom - 1)
    ImageDraw.Draw(picture).rectangle(frame, outline=_ACCENT, width=3)
    return picture


def _panel(strip: Strip, panel: Panel) -> Image.Image:
    down, across = strip.grid
    if not all(0 <= patch < down * across for patch in panel.kept):
        raise ValueError(f"kept: expected patches in 0..{down * across - 1}, got {panel.kept}")
    view = _enlarge(strip.image.crop(strip.box), _panel_size(strip.grid))
    if len(panel.kept) == down * across:
        return view
    clear = Image.new("L", (across, down), 0)
    for patch in panel.kept:
        clear.putpixel((patch % across, patch // across), 255)
    clear = clear.resize(view.size, Image.Resampling.NEAREST)
    veiled = Image.blend(view, Image.new("RGB", view.size, _VEIL), _VEIL_STRENGTH)
    veiled.paste(_HATCH, mask=_hatch(view.size))
    veiled.paste(view, mask=clear)
    _outline(veiled, strip.grid, panel.kept)
    return veiled


def _panel_size(grid: tuple[int, int]) -> tuple[int, int]:
    """Whole pixels per patch, so that every patch is drawn at the same size."""
    down, across = grid
    patch = -(-PANEL // max(down, across))
    return (across * patch, down * patch)


def _enlarge(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Show the pixels of a small picture as they are; smooth a large one."""
    tiny = image.width * 4 <= size[0]
    how = Image.Resampling.NEAREST if tiny else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, how)


def _hatch(size: tuple[int, int]) -> Image.Image:
    width, height = size
    mask = Image.new("L", size, 0)
    pen = ImageDraw.Draw(mask)
    for start in range(-height, width, 9):
        pen.line((start, height, start + height, 0), fill=150, width=1)
    return mask


def _outline(picture: Image.Image, grid: tuple[int, int], kept: Iterable[int]) -> None:
    """Frame the survivors; where two touch, a line between them would only distract."""
    down, across = grid
    patch = picture.width // across
    cells = set(kept)
    pen = ImageDraw.Draw(picture)
    for cell in cells:
        row, column = divmod(cell, across)
        left, top = column * patch, row * patch
        right, bottom = left + patch - 1, top + patch - 1
        neighbours = (
            (column > 0 and cell - 1 in cells, (left, top, left, bottom)),
            (column < across - 1 and cell + 1 in cells, (right, top, right, bottom)),
            (row > 0 and cell - across in cells, (left, top, right, top)),
            (row < down - 1 and cell + across in cells, (left, bottom, right, bottom)),
        )
        for joined, edge in neighbours:
            if not joined:
                pen.line(edge, fill=_ACCENT)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _fit(text: str, width: int, size: int) -> str:
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
