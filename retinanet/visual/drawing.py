"""Boxes with captions on images, and contact sheets of many images. Needs no display."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from retinanet.errors import output_file
from retinanet.visual.text import drawable, load_font, readable_names

Colour = tuple[int, int, int]

LEGIBLE_SIDE = 320  # pixels; smaller images are enlarged before text is drawn on them
LARGEST_SIDE = 4096  # pixels; nothing is enlarged beyond this
CELL_SIDE = 640  # pixels of the long side of every image on a contact sheet
SMALLEST_FONT = 11  # pixels
BACKGROUND = 150  # grey level between the images of a contact sheet, whose own background is often white
CAPTION_LIMIT, CAPTION_SHARE = 40, 1 / 4  # beyond this number or share of the image, a legend replaces captions
LEGEND_ROWS = 8

# Twenty colours, each as far as possible from those before it (CIEDE2000; Glasbey et al., "Colour displays for
# categorical images", 2007), with a WCAG contrast of at least 9 to black: black text is legible on each of them, and on
# any background either the colour or the black edge of its line stands out.
PALETTE = (
    "#ff9977", "#00ff00", "#ff77ff", "#00ffff", "#ddbb00", "#77bbff", "#ff9900", "#ffbbdd", "#77bb99", "#00ffbb",
    "#99bb33", "#bbbbff", "#dddd99", "#00bbdd", "#bbff99", "#bbff00", "#ddbb77", "#55dd77", "#ff9999", "#55bbbb",
)  # fmt: skip

# Lengths of the coloured and the black parts of a line, in units of its width.
LINE_STYLES = {"solid": (1, 0), "dashed": (6, 4), "dotted": (1.5, 3)}


def class_colour(label: int) -> Colour:
    """The RGB colour of a class, always the same. After twenty classes the colours repeat, paler each time."""
    cycle, number = divmod(label, len(PALETTE))
    white = cycle % 5 * 0.15
    return tuple(round((1 - white) * channel + white * 255) for channel in ImageColor.getrgb(PALETTE[number]))


def enlarge(image: np.ndarray, zoom: int) -> np.ndarray:
    """Each pixel of an image [H, W, 3] as `zoom` x `zoom` pixels."""
    return image.repeat(zoom, axis=0).repeat(zoom, axis=1)


def fit_to_cell(image: np.ndarray) -> tuple[np.ndarray, float]:
    """Scale an image [H, W, 3] so that its long side fits a cell of a contact sheet; returns it and the scale."""
    scale = CELL_SIDE / max(image.shape[:2])
    if scale >= 2:  # a whole factor keeps the pixels of small images sharp
        return enlarge(image, int(scale)), int(scale)
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)), scale


def legible_zoom(image_size: tuple[int, int], captions: Sequence[str], short_side: int = LEGIBLE_SIDE) -> int:
    """The whole factor by which to enlarge an image of (height, width), for its captions and a legible short side."""
    widest = max((width for width, _ in _plate_sizes(captions, SMALLEST_FONT)), default=0)
    wanted = np.ceil(max(short_side / min(image_size), widest / image_size[1]))
    return int(max(1, min(wanted, LARGEST_SIDE // max(image_size))))


def line_width(image_size: tuple[int, int]) -> int:
    """Width of lines, pixels, on an image of this size (in either order)."""
    return max(2, round(min(image_size) / 200))


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    captions: Sequence[str] | None = None,
    styles: Sequence[str] | None = None,
    colours: Sequence[Colour] | None = None,
    zoom: int | None = None,
    class_names: Sequence[str] | None = None,
) -> np.ndarray:
    """Draw boxes in the colours of their classes, with captions if there is room for them.

    Line width and font size depend on the image's size; an image too small for its captions is enlarged first. If
    captions would hide the objects, a legend below the image replaces them.

    Args:
        image: [H, W, 3] uint8.
        boxes: [N, 4] xyxy, pixels of the image.
        labels: [N] 0-based.
        captions: [N] texts; "" for a box without one.
        styles: [N] keys of LINE_STYLES; by default all solid.
        colours: [N] RGB; by default those of the classes.
        zoom: whole factor to enlarge the image by; by default `legible_zoom`.
        class_names: name of each label, for the legend, which is added below the image and may make it wider; None
            for no legend.
    """
    captions = [""] * len(labels) if captions is None else [drawable(text) for text in captions]
    styles = ["solid"] * len(labels) if styles is None else styles
    colours = [class_colour(int(label)) for label in labels] if colours is None else colours
    zoom = legible_zoom(image.shape[:2], captions) if zoom is None else zoom
    boxes = (np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * zoom).round().astype(np.int64)
    boxes[:, 2:] = np.maximum(boxes[:, 2:] - 1, boxes[:, :2])  # the last pixel of each box
    canvas = torch.from_numpy(enlarge(image, zoom)).permute(2, 0, 1)
    picture = Image.fromarray(_draw_lines(canvas, boxes, styles, colours).permute(1, 2, 0).contiguous().numpy())
    size = _caption_size(picture.size, captions)
    if size is not None:
        _draw_captions(picture, boxes, captions, colours, size)
    elif class_names is not None:
        legend = draw_legend(labels, class_names, picture.width)
        beside = ((0, 0), (0, legend.shape[1] - picture.width), (0, 0))
        return np.concatenate([np.pad(np.asarray(picture), beside, constant_values=255), legend])
    return np.asarray(picture)


def _draw_lines(canvas: Tensor, boxes: np.ndarray, styles: Sequence[str], colours: Sequence[Colour]) -> Tensor:
    """Draw lines just inside the boxes, thinner for small boxes; a black edge shows where the colour does not."""
    rows, columns = (torch.arange(length, dtype=torch.int32) for length in canvas.shape[1:])
    sides = (boxes[:, 2:] - boxes[:, :2] + 1).min(axis=1, initial=2**30)
    # Widths of 1, 4, 16, ... pixels: all lines of one width are drawn together.
    steps = np.log(np.maximum(sides / 12, 1)) // np.log(4)
    widths = np.minimum(4**steps, line_width(canvas.shape[1:])).astype(int).tolist()
    groups = defaultdict(list)
    for width, style, box, colour in zip(widths, styles, boxes, colours, strict=True):
        groups[width, style].append((box, colour))
    for width, style in sorted(groups, reverse=True):
        group_boxes, group_colours = zip(*groups[width, style], strict=True)
        corners = torch.from_numpy(np.array(group_boxes))
        # A thin line has its edge outside the box, so that the edge does not hide a small object.
        edge = corners + torch.tensor([-1, -1, 1, 1]) * (width == 1)
        black = draw_bounding_boxes(canvas, edge, colors="black", width=width + max(1, width // 3))
        coloured = draw_bounding_boxes(black, corners, colors=list(group_colours), width=width)
        dash, gap = (part * width for part in LINE_STYLES[style])
        # torchvision draws only solid lines; stripes across the image turn them into dashes.
        canvas = torch.where((rows[:, None] + columns) % (dash + gap) < dash, coloured, black) if gap else coloured
    return canvas


def _plate_sizes(captions: Sequence[str], font_size: float) -> list[tuple[int, int]]:
    """Width and height, pixels, of the plate under each caption."""
    fonts = [load_font(text, font_size) for text in captions]
    return [
        (int(np.ceil(font.getlength(text) + 0.4 * font_size)), sum(font.getmetrics()))
        for font, text in zip(fonts, captions, strict=True)
    ]


def _caption_size(picture_size: tuple[int, int], captions: Sequence[str]) -> float | None:
    """The font size, pixels, at which captions leave enough of an image visible; None if there is none."""
    captions = [text for text in captions if text]
    if len(captions) > CAPTION_LIMIT:
        return None
    for size in (max(SMALLEST_FONT, min(picture_size) / 32), SMALLEST_FONT):
        plates = np.array(_plate_sizes(captions, size)).reshape(-1, 2)
        if (plates <= picture_size).all() and plates.prod(axis=1).sum() <= CAPTION_SHARE * np.prod(picture_size):
            return size
    return None


# Not torchvision's captions: they lie inside the boxes, are cut off at the image's border, and use only one font.
def _draw_captions(
    picture: Image.Image, boxes: np.ndarray, captions: Sequence[str], colours: Sequence[Colour], size: float
) -> None:
    """Draw each caption on a plate in the colour of its box."""
    canvas = ImageDraw.Draw(picture)
    placed = np.zeros((0, 4), dtype=np.int64)
    for box, text, colour, plate_size in zip(boxes, captions, colours, _plate_sizes(captions, size), strict=True):
        if text:
            plate = _place_caption(box, plate_size, picture.size, placed)
            placed = np.concatenate([placed, plate[None]])
            canvas.rectangle((*plate[:2], *(plate[2:] - 1)), fill=colour)
            x, y = plate[:2].tolist()
            canvas.text((x + round(0.2 * size), y), text, fill="black", font=load_font(text, size))


def _place_caption(
    box: np.ndarray, plate_size: tuple[int, int], picture_size: tuple[int, int], placed: np.ndarray
) -> np.ndarray:
    """[4] xyxy of a caption: above its box, or else inside or below it, where it hides the fewest earlier captions."""
    x1, y1, _, y2 = box.tolist()
    height = plate_size[1]
    tops = [y1 - height, y1, y2 + 1, y2 - height, *(y1 - step * height for step in (2, 3, 4))]
    tops = [y for y in tops if 0 <= y <= picture_size[1] - height] or [y1]
    corners = np.array([(x1, y) for y in tops]).clip(0, np.subtract(picture_size, plate_size))
    plates = np.concatenate([corners, corners + plate_size], axis=1)[:, None]  # [places, 1, 4]
    hits = ((plates[..., :2] < placed[:, 2:]) & (plates[..., 2:] > placed[:, :2])).all(axis=2)  # [places, captions]
    return plates[hits.sum(axis=1).argmin(), 0]


def draw_legend(labels: Sequence[int], class_names: Sequence[str], width: int) -> np.ndarray:
    """Draw the classes that are present, each with its colour and its number of boxes, the most frequent first.

    Takes the labels [N] of the boxes and returns an image [H, W, 3] uint8, where W is `width` or the width of the
    widest entry, if that is larger.
    """
    size = max(SMALLEST_FONT, min(16, width / 40))
    names, row_height = readable_names(class_names), round(1.6 * size)
    counts = Counter(int(label) for label in labels).most_common()
    texts = [f"{names[label]}: {count}" for label, count in counts]
    widths = [round(load_font(text, size).getlength(text) + 2.5 * size) for text in texts]
    legend = Image.new("RGB", (max(width, *widths, 0), LEGEND_ROWS * row_height), "white")
    canvas = ImageDraw.Draw(legend)
    x = y = 0
    for (label, _), text, entry_width in zip(counts, texts, widths, strict=True):
        if x and x + entry_width > legend.width:
            x, y = 0, y + row_height
        if y == legend.height:
            break
        colour = class_colour(label)
        canvas.rectangle((x + 0.4 * size, y + 0.3 * size, x + 1.4 * size, y + 1.3 * size), colour, "black")
        canvas.text((x + 1.8 * size, y + row_height / 2), text, "black", load_font(text, size), anchor="lm")
        x += entry_width
    return np.asarray(legend)[: y + row_height]


def side_by_side(pictures: Sequence[np.ndarray], titles: Sequence[str]) -> np.ndarray:
    """Arrange pictures in a row, each under its title."""
    titles = [drawable(title) for title in titles]
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    gap = max(2, width // 100)
    for size in np.linspace(max(SMALLEST_FONT, min(height, width) / 24), SMALLEST_FONT, 8).tolist():
        length = max(load_font(title, size).getlength(title) for title in titles)
        if length <= width - 2 * gap:
            break
    bar = round(1.6 * size)
    column_width = max(width, round(length + 0.5) + 2 * gap) + gap
    sheet = Image.new("RGB", (len(pictures) * column_width - gap, height + bar), "white")
    canvas = ImageDraw.Draw(sheet)
    for column, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        x = column * column_width
        sheet.paste(Image.fromarray(picture), (x, bar))
        canvas.rectangle((x + column_width - gap, 0, x + column_width - 1, sheet.height), "lightgrey")
        canvas.text((x + gap, bar / 2), title, "black", load_font(title, size), anchor="lm")
    return np.asarray(sheet)


def contact_sheet(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Arrange pictures of any size in a grid of equal cells."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    gap = max(4, width // 60)
    rows = -(-len(pictures) // columns)
    columns = min(columns, len(pictures))
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), BACKGROUND, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        y, x = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return sheet


def save_image(picture: np.ndarray, path: str | Path) -> None:
    """Write a PNG file."""
    Image.fromarray(picture).save(output_file(path), compress_level=1)
