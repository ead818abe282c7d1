import numpy as np
import pytest
from helpers import gradient
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from retinanet.visual.drawing import (
    CELL_SIDE,
    class_colour,
    contact_sheet,
    draw_boxes,
    fit_to_cell,
    legible_zoom,
    save_image,
    side_by_side,
)

GREY = np.full((320, 320, 3), 128, dtype=np.uint8)  # large enough not to be enlarged


def changed(picture, background=128):
    return (picture != background).any(axis=2)


def coloured(picture, label):
    return (picture == class_colour(label)).all(axis=2)


# Colours


def test_every_class_has_its_own_colour():
    colours = [class_colour(label) for label in range(80)]
    assert len(set(colours)) == 80
    assert all(0 <= channel <= 255 for colour in colours for channel in colour)


def test_the_first_twenty_classes_can_be_told_apart():
    lab = rgb2lab(np.array([class_colour(label) for label in range(20)])[:, None] / 255)[:, 0]
    distances = deltaE_ciede2000(lab[:, None], lab[None]) + 100 * np.eye(20)
    assert distances.min() > 10 and distances[:10, :10].min() > 17


# Lines


def test_a_box_is_drawn_on_its_pixels_and_nowhere_else():
    image, boxes = GREY.copy(), np.array([[50.0, 60.0, 150.0, 200.0]])
    picture = draw_boxes(image, boxes, [2])
    for y, x in ((60, 50), (60, 149), (199, 50), (199, 149), (130, 50), (60, 100)):
        assert coloured(picture, 2)[y, x]
    ys, xs = changed(picture).nonzero()
    assert (ys.min(), ys.max() + 1, xs.min(), xs.max() + 1) == (60, 200, 50, 150)
    assert not changed(picture)[66:194, 56:144].any()
    np.testing.assert_array_equal(image, GREY)
    assert boxes.tolist() == [[50, 60, 150, 200]]


@pytest.mark.parametrize("background", [0, 60, 128, 200, 255])
@pytest.mark.parametrize("size", [12, 40, 200])
@pytest.mark.parametrize("style", ["solid", "dashed", "dotted"])
def test_lines_stand_out_from_any_background(background, size, style):
    def luminance(values):  # as WCAG defines it
        linear = np.where(values <= 0.04045 * 255, values / 255 / 12.92, ((values / 255 + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722] + 0.05

    image = np.full((320, 320, 3), background, np.uint8)
    pixels = draw_boxes(image, np.array([[50, 50, 50 + size, 50 + size]]), [12], styles=[style])
    line = luminance(pixels[changed(pixels, background)].astype(float))
    ground = luminance(np.full(3, float(background)))
    contrast = np.maximum(line, ground) / np.minimum(line, ground)
    assert (contrast >= 3).sum() >= size


@pytest.mark.parametrize(("style", "low", "high"), [("solid", 1, 1), ("dashed", 0.5, 0.7), ("dotted", 0.25, 0.45)])
def test_lines_are_told_apart_by_style(style, low, high):
    picture = draw_boxes(GREY, np.array([[40.0, 50.0, 240.0, 290.0]]), [2], styles=[style])
    colour = coloured(picture, 2)
    for side in (colour[50, 40:240], colour[289, 40:240], colour[50:290, 40], colour[50:290, 239]):
        assert low <= side.mean() <= high


@pytest.mark.parametrize("box", [[100.2, 100.2, 100.4, 100.3], [-20, 310, 5, 400], [400, 400, 500, 500]])
def test_boxes_below_a_pixel_or_beyond_the_border_are_drawn_where_they_are(box):
    picture = draw_boxes(GREY, np.array([box]), [0])
    assert picture.shape == GREY.shape and changed(picture).any() == (box[0] < 320)


def test_many_small_boxes_leave_their_objects_visible():
    rng = np.random.default_rng(1)
    corners = rng.integers(10, 610, (300, 2))
    boxes = np.concatenate([corners, corners + 12], axis=1)
    image = np.full((640, 640, 3), 20, dtype=np.uint8)
    for x1, y1, x2, y2 in boxes:
        image[y1:y2, x1:x2] = 250
    picture = draw_boxes(image, boxes, [0] * 300, ["ship"] * 300, class_names=["ship"])
    visible = (picture[:640] == 250).all(axis=2).sum() / (image == 250).all(axis=2).sum()
    assert visible >= 0.6
    assert coloured(picture[640:], 0).sum() > 100 and picture.shape[0] < 700  # a legend of one line


def test_as_many_labels_as_boxes_are_needed():
    with pytest.raises(ValueError, match="zip"):
        draw_boxes(GREY, np.zeros((2, 4)), [0])


# Enlarging


def test_a_small_image_is_enlarged_a_whole_number_of_times_with_its_boxes():
    small = gradient(100, 150)
    np.testing.assert_array_equal(draw_boxes(small, [], []), small.repeat(4, axis=0).repeat(4, axis=1))
    grey = np.full((100, 150, 3), 128, dtype=np.uint8)
    ys, xs = changed(draw_boxes(grey, np.array([[10, 20, 30, 50]]), [0])).nonzero()
    assert (ys.min(), ys.max() + 1, xs.min(), xs.max() + 1) == (80, 200, 40, 120)


def test_very_long_images_are_not_enlarged_without_end():
    assert legible_zoom((40, 4000), ["cat 0.90"]) == 1
    assert legible_zoom((8, 2000), ["cat 0.90"]) == 2


@pytest.mark.parametrize(
    ("size", "expected"), [((96, 96), 6), ((480, 640), 1), ((1200, 300), 0.533), ((10, 4000), 0.16)]
)
def test_every_image_of_a_sheet_fits_its_cell(size, expected):
    image, scale = fit_to_cell(np.zeros((*size, 3), np.uint8))
    assert scale == pytest.approx(expected, abs=1e-3) and CELL_SIDE - 100 < max(image.shape) <= CELL_SIDE
    assert image.shape[:2] == tuple(max(1, round(side * scale)) for side in size)


# Captions


def plate_of(picture, plain):
    """Rows and columns in which a caption changed a picture."""
    ys, xs = (plain != picture).any(axis=2).nonzero()
    return ys.min(), ys.max() + 1, xs.min(), xs.max() + 1


def test_a_caption_lies_above_its_box_in_its_colour():
    box = np.array([[50, 100, 250, 300]])
    picture = draw_boxes(GREY, box, [1], ["cat 0.93"])
    top, bottom, left, right = plate_of(picture, draw_boxes(GREY, box, [1]))
    assert 60 < top < 100 and bottom == 100 and left == 50
    plate = picture[top:bottom, left:right]
    assert (plate == class_colour(1)).all(axis=2).mean() > 0.4 and plate.max(axis=2).min() < 80


@pytest.mark.parametrize("box", [[0, 0, 40, 40], [300, 2, 320, 30], [-20, -20, 400, 400], [300, 300, 320, 320]])
def test_a_caption_is_never_cut_off_at_the_border(box):
    inside = np.array([[100, 200, 110, 210]])
    top, bottom, left, right = plate_of(draw_boxes(GREY, inside, [0], ["a caption"]), draw_boxes(GREY, inside, [0]))
    picture = draw_boxes(GREY, np.array([box]), [0], ["a caption"], colours=[(255, 255, 0)])
    plain = draw_boxes(GREY, np.array([box]), [0], colours=[(255, 255, 0)])
    rows, columns = (plain != picture).any(axis=2).nonzero()
    assert np.ptp(rows) + 1 >= bottom - top - 4 and np.ptp(columns) + 1 >= right - left - 4


def test_captions_of_one_place_do_not_hide_each_other():
    boxes = np.array([[100, 100, 200, 200], [101, 101, 201, 201], [99, 102, 199, 202], [100, 100, 200, 200]])
    picture = draw_boxes(GREY, boxes, range(4), ["caption"] * 4)
    alone = [draw_boxes(GREY, boxes[[label]], [label], ["caption"]) for label in range(4)]
    plain = [draw_boxes(GREY, boxes[[label]], [label]) for label in range(4)]
    for label in range(4):
        plate = coloured(alone[label], label).sum() - coloured(plain[label], label).sum()
        lines = coloured(draw_boxes(GREY, boxes, range(4)), label).sum()
        assert coloured(picture, label).sum() - lines > 0.6 * plate > 0


@pytest.mark.parametrize("shape", [(480, 640), (1500, 2000)])
def test_too_many_captions_become_a_legend_with_counts(shape):
    image = np.full((*shape, 3), 128, dtype=np.uint8)
    corners = np.random.rand(60, 2) * (shape[1] * 0.8, shape[0] * 0.8)
    boxes = np.concatenate([corners, corners + shape[0] * 0.1], axis=1)
    labels, captions, names = [0, 1, 1] * 20, ["cat", "dog", "dog"] * 20, ["cat", "dog"]
    few = draw_boxes(image, boxes[:30], labels[:30], captions[:30], class_names=names)
    assert few.shape == image.shape
    many = draw_boxes(image, boxes, labels, captions, class_names=names)
    np.testing.assert_array_equal(many[: shape[0]], draw_boxes(image, boxes, labels))
    legend = many[shape[0] :]
    first_column = [coloured(legend, label).nonzero()[1].min() for label in (1, 0)]
    assert legend.shape[0] < 60 and first_column == sorted(first_column)  # the most frequent class comes first


def test_a_legend_of_many_long_names_keeps_within_its_rows():
    boxes, labels = np.tile([[10, 10, 60, 60]], (500, 1)), list(range(500))
    names = [f"a very long class name without end, number {label}" for label in labels]
    picture = draw_boxes(GREY, boxes, labels, names, class_names=names)
    assert picture.shape[1] == 320 and picture.shape[0] < 320 + 200


def test_the_legend_of_a_narrow_image_is_not_cut_off():
    narrow, boxes = np.full((640, 60, 3), 128, dtype=np.uint8), np.tile([[5, 5, 50, 50]], (50, 1))
    picture = draw_boxes(narrow, boxes, [0] * 50, ["a long name"] * 50, zoom=1, class_names=["a long name"])
    legend = picture[640:]
    assert picture.shape[1] > 60 and (picture[:640, 60:] == 255).all()
    assert (legend.min(axis=2) < 100)[:, 60:].any() and (legend[:, -2:] == 255).all()


def test_names_without_room_do_not_hide_the_image():
    thin = np.full((6, 640, 3), 128, dtype=np.uint8)
    picture = draw_boxes(thin, np.array([[10, 1, 30, 5]]), [0], ["a caption"], zoom=1, class_names=["a caption"])
    assert changed(picture[:6])[:, 40:].sum() == 0 and len(picture) > 12


# Sheets


def test_side_by_side_puts_titles_above_the_pictures():
    left, right = gradient(200, 300), np.zeros((180, 300, 3), dtype=np.uint8)
    sheet = side_by_side([left, right], ["ground truth", "a much longer title $x_$ \x1b[31m that has to shrink a bit"])
    bar = sheet.shape[0] - 200
    assert 10 < bar < 40
    np.testing.assert_array_equal(sheet[bar:, :300], left)
    start = (sheet.shape[1] + 3) // 2
    np.testing.assert_array_equal(sheet[bar : bar + 180, start : start + 300], right)
    for title in (sheet[:bar, :300], sheet[:bar, start:]):
        assert title.min() < 100 and title[:, -1].min() == 255  # legible, and not cut off


def test_a_title_wider_than_its_picture_is_not_cut_off():
    narrow = np.zeros((50, 40, 3), dtype=np.uint8)
    sheet = side_by_side([narrow, narrow], ["a title much wider than its picture"] * 2)
    ink = (sheet[: sheet.shape[0] - 50].min(axis=2) < 100).any(axis=0)
    assert ink[: sheet.shape[1] // 2].sum() == pytest.approx(ink[sheet.shape[1] // 2 :].sum(), abs=3)
    assert not ink[-3:].any()


def test_a_contact_sheet_shows_every_picture_row_by_row():
    pictures = [np.full((20, 30, 3), value, dtype=np.uint8) for value in (10, 20, 30, 40, 50)]
    sheet = contact_sheet(pictures, columns=2)
    assert sheet.shape == (3 * 24 + 4, 2 * 34 + 4, 3)  # cells of 20 x 30 and gaps of 4
    for index, value in enumerate((10, 20, 30, 40, 50)):
        y, x = 4 + index // 2 * 24, 4 + index % 2 * 34
        assert (sheet[y : y + 20, x : x + 30] == value).all()
    assert (sheet == 150).all(axis=2).sum() == 76 * 72 - 5 * 20 * 30
    mixed = contact_sheet([np.zeros((10, 30, 3), np.uint8), np.zeros((20, 10, 3), np.uint8)], columns=5)
    assert mixed.shape == (28, 72, 3)  # no empty columns
    assert (mixed == 0).all(axis=2).sum() == 10 * 30 + 20 * 10


def test_a_saved_picture_is_a_png_of_the_same_pixels(tmp_path):
    picture = gradient(20, 30)
    save_image(picture, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), picture)
