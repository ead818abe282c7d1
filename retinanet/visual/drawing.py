"""Arrays -> pictures: boxes with captions, and sheets of many pictures. Needs no display."""

import contextlib
import functools
import importlib.util
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

LEGIBLE_SIDE = 320  # pixels; smaller pictures are enlarged before text is drawn on them
LARGEST_SIDE = 4096  # pixels; nothing is enlarged beyond it
SMALLEST_FONT = 11  # pixels
GROUND = 150  # grey around the pictures of a sheet, whose own ground is often white
# Pillow's own font has hardly more than ASCII's letters; these are looked for where others are written.
WIDE_FONTS = ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")
CAPTION_SHARE = 1 / 6  # captions cover at most this share of a picture; it is enlarged until they do

# Twenty colours, each as far as can be from those before it (CIEDE2000; Glasbey et al., "Colour displays for
# categorical images", 2007), with at least nine times black's luminance as WCAG counts it: so black text reads well
# on each, and on any ground either the colour or the black edge of its line stands out by a factor of three.
PALETTE = (
    "#ff9977", "#00ff00", "#ff77ff", "#00ffff", "#ddbb00", "#77bbff", "#ff9900", "#ffbbdd", "#77bb99", "#00ffbb",
    "#99bb33", "#bbbbff", "#dddd99", "#00bbdd", "#bbff99", "#bbff00", "#ddbb77", "#55dd77", "#ff9999", "#55bbbb",
)  # fmt: skip

# Dashes and gaps of a line, in units of its width; None is an unbroken line.
LINE_STYLES = {"solid": None, "dashed": (6, 4), "dotted": (1.5, 3)}


def class_colour(label: int) -> tuple[int, int, int]:
    """RGB of a class: always the same. After twenty, the colours come back, paler each time."""
    cycle, number = divmod(label, len(PALETTE))
    white = cycle % 5 * 0.15
    return tuple(round((1 - white) * channel + white * 255) for channel in ImageColor.getrgb(PALETTE[number]))


def legible_zoom(image_size: tuple[int, int], captions: Sequence[str], short_side: int = LEGIBLE_SIDE) -> int:
    """The whole factor that an image must be enlarged by, so that captions fit into it.

    Args:
        image_size: height and width, pixels.
        captions: texts.
        short_side: what the short side needs at least, pixels.
    """
    height, width = image_size
    area, widest = _captions_extent(captions, SMALLEST_FONT)
    by_area = math.sqrt(area / CAPTION_SHARE / (height * width))
    wanted = math.ceil(max(short_side / min(height, width), widest / width, by_area))
    return max(1, min(wanted, LARGEST_SIDE // max(height, width)))


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    captions: Sequence[str] | None = None,
    styles: Sequence[str] | None = None,
    colours: Sequence[tuple[int, int, int]] | None = None,
    zoom: int | None = None,
) -> np.ndarray:
    """Draw boxes, in the colours of their classes, with a caption each.

    Line width and text follow the picture's size; a picture too small for its captions is enlarged first. A
    caption moves to where it hides no other caption, and as little of the boxes as may be.

    Args:
        image: [H, W, 3] uint8.
        boxes: [N, 4] xyxy, pixels of the image.
        labels: [N] 0-based.
        captions: [N] texts; None for none, "" for none of one box.
        styles: [N] keys of LINE_STYLES; None for solid lines.
        colours: [N] RGB, in place of the colours of the classes.
        zoom: whole factor to enlarge by; by default `legible_zoom`.

    Returns:
        [H', W', 3] uint8, a whole multiple of the size of `image`.
    """
    captions = [""] * len(labels) if captions is None else captions
    styles = ["solid"] * len(labels) if styles is None else styles
    colours = [class_colour(int(label)) for label in labels] if colours is None else colours
    zoom = legible_zoom(image.shape[:2], captions) if zoom is None else zoom
    picture = Image.fromarray(image)
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * zoom
    canvas = ImageDraw.Draw(picture)
    line = line_width(picture.size)
    for box, colour, style in zip(boxes, colours, styles, strict=True):
        _draw_rectangle(canvas, box.tolist(), colour, style, line)
    _draw_captions(canvas, picture.size, boxes, captions, colours)
    return np.asarray(picture)


def line_width(size: tuple[int, int]) -> int:
    """Pixels, for a picture of `size` (in either order)."""
    return max(2, round(min(size) / 200))


def _draw_rectangle(
    canvas: ImageDraw.ImageDraw, box: list[float], colour: tuple[int, int, int], style: str, line: int
) -> None:
    """A rectangle just inside a box, with a black edge on its inside, so that it shows on any ground."""
    for width, fill in ((line + max(1, line // 3), (0, 0, 0)), (line, colour)):
        for x1, y1, x2, y2 in _strokes(box, width, line, style):
            canvas.rectangle((x1, y1, x2 - 1, y2 - 1), fill=fill)


def _strokes(box: list[float], width: int, line: int, style: str) -> Iterator[tuple[int, int, int, int]]:
    """The bars, xyxy, `width` wide, that make up a rectangle's four sides; Pillow draws unbroken lines only."""
    x1, y1, x2, y2 = (round(value) for value in box)
    x2, y2 = max(x2, x1 + width), max(y2, y1 + width)
    for start, end in _dashes(x1, x2, line, style):
        yield start, y1, end, y1 + width
        yield start, y2 - width, end, y2
    for start, end in _dashes(y1, y2, line, style):
        yield x1, start, x1 + width, end
        yield x2 - width, start, x2, end


def _dashes(start: int, end: int, line: int, style: str) -> Iterator[tuple[int, int]]:
    """Start and end of each dash of one side; the last one ends in the corner."""
    if LINE_STYLES[style] is None:
        yield start, end
        return
    dash, gap = (part * line for part in LINE_STYLES[style])
    dash = min(dash, end - start)
    count = max(1, round((end - start - dash) / (dash + gap)))
    step = (end - start - dash) / count
    for number in range(count + 1):
        first = round(start + number * step)
        yield first, max(first + 1, round(first + dash))


def _font(size: float, texts: Sequence[str]) -> ImageFont.FreeTypeFont:
    """A font that has the letters of these texts, as far as one can be found."""
    return _load_font(size, all(text.isascii() for text in texts))


@functools.cache
def _load_font(size: float, ascii_only: bool) -> ImageFont.FreeTypeFont:
    names = [] if ascii_only else [*WIDE_FONTS]
    if names and (matplotlib := importlib.util.find_spec("matplotlib")):
        names.append(str(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"))
    for name in names:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size=size)


def _plate_sizes(captions: Sequence[str], font: ImageFont.FreeTypeFont) -> list[tuple[int, int]]:
    """Width and height, pixels, of the plate under each caption."""
    ascent, descent = font.getmetrics()
    margin = round(0.4 * font.size)
    return [(math.ceil(font.getlength(text)) + margin, ascent + descent) for text in captions]


def _captions_extent(captions: Sequence[str], font_size: float) -> tuple[float, float]:
    """The area of all captions, pixels^2, and the width of the widest, pixels, at a font size."""
    sizes = _plate_sizes([text for text in captions if text], _font(font_size, captions))
    return sum(width * height for width, height in sizes), max((width for width, _ in sizes), default=0)


def _draw_captions(
    canvas: ImageDraw.ImageDraw,
    picture_size: tuple[int, int],
    boxes: np.ndarray,
    captions: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
) -> None:
    """A plate in the colour of its box for each caption, with a thin line to its box if it had to move away."""
    width, height = picture_size
    size = max(SMALLEST_FONT, min(width, height) / 32)
    area, widest = _captions_extent(captions, size)
    shrink = min(1.0, math.sqrt(CAPTION_SHARE * width * height / max(area, 1)), width / max(widest, 1))
    font = _font(max(SMALLEST_FONT, size * shrink), captions)
    plates = np.zeros((len(captions), 4))
    chosen = [index for index, text in enumerate(captions) if text]
    for number, (index, plate_size) in enumerate(
        zip(chosen, _plate_sizes([captions[index] for index in chosen], font), strict=True)
    ):
        plates[index] = _place_caption(boxes, index, plate_size, picture_size, plates[chosen[:number]])
    for index in chosen:
        centre = (plates[index, :2] + plates[index, 2:]) / 2
        nearest = centre.clip(boxes[index, :2], boxes[index, 2:])  # the point of the box
        if (np.abs(nearest - centre) > (plates[index, 2:] - plates[index, :2]) / 2 + 2).any():
            canvas.line((*centre, *nearest), fill=colours[index], width=max(1, round(font.size / 12)))
    for index in chosen:
        x1, y1, x2, y2 = plates[index].tolist()
        canvas.rectangle((x1, y1, x2 - 1, y2 - 1), fill=colours[index])
        canvas.text((x1 + round(0.2 * font.size), y1), captions[index], fill=(0, 0, 0), font=font)


def _place_caption(
    boxes: np.ndarray, index: int, plate_size: tuple[int, int], picture_size: tuple[int, int], placed: np.ndarray
) -> np.ndarray:
    """Where a caption goes: above its box if that is free, else at another side of it, else somewhere near.

    Args:
        boxes: [N, 4] xyxy, pixels of the picture.
        index: whose caption it is.
        plate_size: width and height of the caption.
        picture_size: width and height of the picture.
        placed: [M, 4] xyxy of the captions before it.

    Returns:
        [4] xyxy, inside the picture.
    """
    x1, y1, x2, y2 = boxes[index]
    width, height = plate_size
    corners = [
        (x1, y1 - height), (x2 - width, y1 - height), (x1, y2), (x2 - width, y2),  # outside
        (x1, y1), (x2 - width, y1), (x1, y2 - height), (x2 - width, y2 - height),  # inside
        (x2, y1), (x1 - width, y1),  # beside
    ]  # fmt: skip
    radii, angles = np.meshgrid(np.arange(1, 13) * 1.2, np.arange(16) * math.tau / 16, indexing="ij")
    ring = np.stack([x1 + width * radii / 2 * np.cos(angles), y1 + height * radii * np.sin(angles)], axis=-1)
    corners = np.concatenate([corners, ring.reshape(-1, 2)])
    corners = corners.clip(0, np.maximum(0, np.subtract(picture_size, plate_size))).round()
    plates = np.concatenate([corners, corners + plate_size], axis=1)  # [candidates, 4]
    cost = np.arange(len(plates)) / len(plates)  # earlier ones are preferred
    cost += 100 * _overlaps(plates, placed).sum(axis=1) / (width * height)
    others = np.delete(boxes, index, axis=0)
    areas = np.maximum((others[:, 2:] - others[:, :2]).prod(axis=1), 1)
    cost += 2 * (_overlaps(plates, others) / areas).sum(axis=1)  # the share of each other box that it hides
    return plates[cost.argmin()]


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Area, pixels^2, that each of [N, 4] boxes shares with each of [M, 4] -> [N, M]."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    return sides.clip(min=0).prod(axis=2)


def side_by_side(pictures: Sequence[np.ndarray], titles: Sequence[str]) -> np.ndarray:
    """Pictures of one size in a row, each under its title."""
    height, width = pictures[0].shape[:2]
    size = max(SMALLEST_FONT, min(height, width) / 24)
    widest = max(_font(size, titles).getlength(title) for title in titles)
    gap = max(2, width // 100)
    font = _font(max(SMALLEST_FONT, size * min(1, (width - 2 * gap) / widest)), titles)
    widest = math.ceil(max(font.getlength(title) for title in titles))
    bar = round(1.6 * font.size)
    column_width = max(width, widest + 2 * gap) + gap
    sheet = Image.new("RGB", (len(pictures) * column_width - gap, height + bar), "white")
    canvas = ImageDraw.Draw(sheet)
    for column, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        sheet.paste(Image.fromarray(picture), (column * column_width, bar))
        canvas.rectangle(
            ((column + 1) * column_width - gap, 0, (column + 1) * column_width - 1, sheet.height), "lightgrey"
        )
        canvas.text((column * column_width + gap, bar / 2), title, fill="black", font=font, anchor="lm")
    return np.asarray(sheet)


def contact_sheet(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures of any size in a grid of equal cells."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    gap = max(4, width // 60)
    rows = -(-len(pictures) // columns)
    columns = min(columns, len(pictures))
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), GROUND, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        y, x = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return sheet


def save_image(picture: np.ndarray, path: str | Path) -> None:
    """Write a PNG file."""
    Image.fromarray(picture).save(path, compress_level=1)
