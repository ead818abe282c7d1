"""Arrays -> pictures: boxes with captions, and sheets of many pictures. Needs no display."""

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GOLDEN_RATIO = (5**0.5 - 1) / 2
LEGIBLE_SIDE = 320  # smaller pictures are enlarged before text is drawn on them


def class_colour(label: int) -> tuple[int, int, int]:
    """RGB of a class: always the same, and far in hue from the classes before it."""
    hue = (0.02 + label * GOLDEN_RATIO) % 1
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.85, 0.95))


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, labels: Sequence[int], captions: Sequence[str] | None = None
) -> np.ndarray:
    """Draw boxes, in the colours of their classes, with a caption each.

    Line width and text follow the picture's size; a picture too small for text is enlarged first.

    Args:
        image: [H, W, 3] uint8.
        boxes: [N, 4] xyxy, pixels of the image.
        labels: [N] 0-based.
        captions: [N] texts; None for none.

    Returns:
        [H', W', 3] uint8, a whole multiple of the size of `image`.
    """
    zoom = math.ceil(LEGIBLE_SIDE / min(image.shape[:2]))
    picture = Image.fromarray(image)
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    canvas = ImageDraw.Draw(picture)
    side = min(picture.size)
    line = max(2, round(side / 200))
    font = ImageFont.load_default(size=max(11, side / 32))
    for index, (box, label) in enumerate(zip(np.asarray(boxes) * zoom, labels, strict=True)):
        colour = class_colour(int(label))
        x1, y1, x2, y2 = box.tolist()
        canvas.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=line)
        if captions is not None:
            _draw_caption(canvas, picture.size, (x1, y1), captions[index], colour, font)
    return np.asarray(picture)


def _draw_caption(
    canvas: ImageDraw.ImageDraw,
    size: tuple[int, int],
    corner: tuple[float, float],
    text: str,
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont,
) -> None:
    """A plate in the class's colour with black or white text, above the box, or where it fits in the picture."""
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    width, height = right + left, bottom + top
    x = min(max(0, corner[0]), max(0, size[0] - width))
    y = min(max(0, corner[1] - height), max(0, size[1] - height))
    canvas.rectangle((x, y, x + width, y + height), fill=colour)
    red, green, blue = colour
    is_bright = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    canvas.text((x, y), text, fill=(0, 0, 0) if is_bright else (255, 255, 255), font=font)


def side_by_side(pictures: Sequence[np.ndarray], titles: Sequence[str]) -> np.ndarray:
    """Pictures of one size in a row, each under its title."""
    height, width = pictures[0].shape[:2]
    font = ImageFont.load_default(size=max(11, min(height, width) / 24))
    bar = round(1.6 * font.size)
    gap = max(2, width // 100)
    sheet = Image.new("RGB", (len(pictures) * (width + gap) - gap, height + bar), "white")
    canvas = ImageDraw.Draw(sheet)
    for column, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        sheet.paste(Image.fromarray(picture), (column * (width + gap), bar))
        canvas.text((column * (width + gap) + gap, bar / 2), title, fill="black", font=font, anchor="lm")
    return np.asarray(sheet)


def contact_sheet(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures of any size in a grid of equal cells."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    gap = max(4, width // 60)
    rows = -(-len(pictures) // columns)
    columns = min(columns, len(pictures))
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        y, x = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return sheet


def save_picture(picture: np.ndarray, path: str | Path) -> None:
    """Write a PNG file."""
    Image.fromarray(picture).save(path)
