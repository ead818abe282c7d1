import numpy as np
import pytest
from helpers import gradient
from PIL import Image, ImageFont
from skimage.color import deltaE_ciede2000, rgb2lab

from retinanet.visual.drawing import class_colour, contact_sheet, draw_boxes, legible_zoom, save_image, side_by_side

GREY = np.full((320, 320, 3), 128, dtype=np.uint8)  # large enough not to be enlarged


def changed(picture):
    return (picture != 128).any(axis=2)


def test_every_class_has_its_own_colour():
    colours = [class_colour(label) for label in range(80)]
    assert colours == [class_colour(label) for label in range(80)]
    assert len(set(colours)) == 80
    assert all(0 <= channel <= 255 for colour in colours for channel in colour)


def test_neighbouring_classes_look_different():
    colours = np.array([class_colour(label) for label in range(20)])
    assert np.abs(np.diff(colours, axis=0)).sum(axis=1).min() > 150


def test_a_box_is_drawn_on_its_pixels_and_nowhere_else():
    picture = draw_boxes(GREY, np.array([[50.0, 60.0, 150.0, 200.0]]), [2])
    colour = class_colour(2)
    for y, x in ((60, 50), (60, 149), (199, 50), (199, 149), (130, 50), (60, 100)):
        assert tuple(picture[y, x]) == colour
    ys, xs = changed(picture).nonzero()
    assert (ys.min(), ys.max() + 1, xs.min(), xs.max() + 1) == (60, 200, 50, 150)
    assert not changed(picture)[66:194, 56:144].any()


def test_without_boxes_the_picture_is_unchanged():
    picture = gradient(330, 340)
    np.testing.assert_array_equal(draw_boxes(picture, np.zeros((0, 4)), []), picture)


def test_the_input_is_left_alone():
    image, boxes = GREY.copy(), np.array([[10.0, 10.0, 50.0, 50.0]])
    draw_boxes(image, boxes, [0], ["cat"])
    np.testing.assert_array_equal(image, GREY)
    assert boxes.tolist() == [[10, 10, 50, 50]]


def test_a_small_picture_is_enlarged_a_whole_number_of_times_with_its_boxes():
    small = gradient(100, 150)
    np.testing.assert_array_equal(draw_boxes(small, [], []), small.repeat(4, axis=0).repeat(4, axis=1))
    grey = np.full((100, 150, 3), 128, dtype=np.uint8)
    ys, xs = changed(draw_boxes(grey, np.array([[10, 20, 30, 50]]), [0])).nonzero()
    assert (ys.min(), ys.max() + 1, xs.min(), xs.max() + 1) == (80, 200, 40, 120)


def test_a_caption_stands_above_its_box_in_its_colour():
    box = np.array([[50, 100, 250, 300]])
    plain, picture = draw_boxes(GREY, box, [1]), draw_boxes(GREY, box, [1], ["cat 0.93"])
    ys, xs = (plain != picture).any(axis=2).nonzero()
    plate = picture[ys.min() : 100, xs.min() : xs.max() + 1]
    assert 60 < ys.min() < 100 and ys.max() <= 100 and xs.min() == 50
    assert (plate == class_colour(1)).all(axis=2).mean() > 0.4
    assert not changed(picture)[: ys.min()].any()


@pytest.mark.parametrize("label", range(12))
def test_text_stands_out_from_its_plate(label):
    picture = draw_boxes(GREY, np.array([[50, 100, 250, 300]]), [label], ["MMM"]).astype(int)
    plate = picture[85:99, 52:70].reshape(-1, 3) @ [0.299, 0.587, 0.114]
    assert plate.max() - plate.min() > 80


@pytest.mark.parametrize("box", [[0, 0, 40, 40], [300, 2, 320, 30], [-20, -20, 400, 400], [300, 300, 320, 320]])
def test_a_caption_stays_in_the_picture(box):
    centre = draw_boxes(GREY, np.array([[100, 200, 110, 210]]), [0], ["a caption"])
    size = changed(centre).sum()
    picture = draw_boxes(GREY, np.array([box]), [0], ["a caption"])
    plain = draw_boxes(GREY, np.array([box]), [0])
    assert picture.shape == GREY.shape
    # As many pixels as anywhere else, but for those where the plate covers the box's own line.
    assert changed(picture).sum() - changed(plain).sum() > 0.5 * size


def test_captions_do_not_hide_each_other():
    boxes = np.array([[100, 100, 200, 200], [101, 101, 201, 201], [99, 102, 199, 202]])
    picture = draw_boxes(GREY, boxes, [0, 1, 2], ["caption"] * 3)
    plain = draw_boxes(GREY, boxes, [0, 1, 2])
    for label in range(3):
        alone = draw_boxes(GREY, boxes[[label]], [label], ["caption"])
        plate = count_colour(alone, label) - count_colour(draw_boxes(GREY, boxes[[label]], [label]), label)
        assert count_colour(picture, label) - count_colour(plain, label) > 0.7 * plate > 0


def count_colour(picture, label):
    return (picture == class_colour(label)).all(axis=2).sum()


def test_line_styles_differ():
    box = np.array([[50, 50, 250, 250]])
    ink = [changed(draw_boxes(GREY, box, [0], styles=[style])).sum() for style in ("dotted", "dashed", "solid")]
    assert 0 < 1.2 * ink[0] < ink[1] < 0.8 * ink[2]


def test_boxes_smaller_than_a_pixel_are_drawn():
    assert changed(draw_boxes(GREY, np.array([[100.2, 100.2, 100.4, 100.3]]), [0])).any()


def test_as_many_labels_as_boxes_are_needed():
    with pytest.raises(ValueError, match="zip"):
        draw_boxes(GREY, np.zeros((2, 4)), [0])


def test_side_by_side_puts_titles_above_the_pictures():
    left, right = gradient(200, 300), np.zeros((200, 300, 3), dtype=np.uint8)
    sheet = side_by_side([left, right], ["truth", "found"])
    bar = sheet.shape[0] - 200
    assert 10 < bar < 40
    np.testing.assert_array_equal(sheet[bar:, :300], left)
    np.testing.assert_array_equal(sheet[bar:, -300:], right)
    assert sheet.shape[1] > 600  # a gap
    for title in (sheet[:bar, :300], sheet[:bar, -300:]):
        assert title.min() < 100 and title.max() == 255


def test_a_contact_sheet_shows_every_picture_row_by_row():
    pictures = [np.full((20, 30, 3), value, dtype=np.uint8) for value in (10, 20, 30, 40, 50)]
    sheet = contact_sheet(pictures, columns=2)
    assert sheet.shape == (3 * 24 + 4, 2 * 34 + 4, 3)  # cells of 20 x 30 and gaps of 4
    for index, value in enumerate((10, 20, 30, 40, 50)):
        y, x = 4 + index // 2 * 24, 4 + index % 2 * 34
        assert (sheet[y : y + 20, x : x + 30] == value).all()
    assert (sheet == 150).all(axis=2).sum() == 76 * 72 - 5 * 20 * 30


def test_a_contact_sheet_takes_pictures_of_different_sizes():
    sheet = contact_sheet([np.zeros((10, 30, 3), np.uint8), np.zeros((20, 10, 3), np.uint8)], columns=5)
    assert sheet.shape == (28, 72, 3)  # no empty columns
    assert (sheet == 0).all(axis=2).sum() == 10 * 30 + 20 * 10


def test_a_saved_picture_is_a_png_of_the_same_pixels(tmp_path):
    picture = gradient(12, 17)
    save_image(picture, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.format == "PNG"
        np.testing.assert_array_equal(np.asarray(saved), picture)


def luminance(colour):
    """Relative luminance as WCAG 2 defines it."""
    channels = np.asarray(colour) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


@pytest.mark.parametrize("label", range(40))
def test_text_reads_well_and_lines_show_on_any_ground(label):
    bright = luminance(class_colour(label)) + 0.05
    assert bright / 0.05 >= 7  # black text, at WCAG's strictest
    for ground in np.linspace(0, 1, 101) + 0.05:  # either the colour or its black edge stands out
        assert max(bright / ground, ground / bright, ground / 0.05) >= 2.9


def test_the_first_twenty_classes_can_be_told_apart():
    lab = rgb2lab(np.array([class_colour(label) for label in range(20)])[:, None] / 255)[:, 0]
    distances = deltaE_ciede2000(lab[:, None], lab[None]) + 100 * np.eye(20)
    assert distances.min() > 10 and distances[:10, :10].min() > 17


@pytest.mark.parametrize(("style", "low", "high"), [("solid", 1, 1), ("dashed", 0.55, 0.75), ("dotted", 0.3, 0.55)])
def test_lines_are_told_apart_by_style(style, low, high):
    picture = draw_boxes(GREY, np.array([[40.0, 50.0, 240.0, 290.0]]), [2], styles=[style])
    coloured = (picture == class_colour(2)).all(axis=2)
    for side in (coloured[50, 40:240], coloured[289, 40:240], coloured[50:290, 40], coloured[50:290, 239]):
        assert low <= side.mean() <= high
    for y, x in ((50, 40), (50, 239), (289, 40), (289, 239)):  # the corners are always drawn
        assert coloured[y, x]


@pytest.mark.parametrize("shape", [(240, 320), (3000, 4000)], ids=["320 px", "4000 px"])
def test_thirty_captions_are_legible_and_none_hides_another(shape):
    image = np.full((*shape, 3), 128, dtype=np.uint8)
    corners = np.random.rand(30, 2) * (shape[1] * 0.8, shape[0] * 0.8)
    boxes = np.concatenate([corners, corners + shape[0] * 0.15], axis=1)
    captions = [f"class {number} 0.87" for number in range(30)]
    zoom = legible_zoom(shape, captions)
    together = draw_boxes(image, boxes, range(30), captions, colours=[(250, 250, 0)] * 30)
    assert together.shape == (shape[0] * zoom, shape[1] * zoom, 3)
    # Plates are the only rows of this colour as tall as text; each one drawn alone covers as much.
    yellow = (together == (250, 250, 0)).all(axis=2).sum()
    lines = (draw_boxes(image, boxes, range(30), colours=[(250, 250, 0)] * 30, zoom=zoom) == (250, 250, 0)).all(axis=2)
    alone = draw_boxes(image, boxes[:1], [0], captions[:1], colours=[(250, 250, 0)], zoom=zoom)
    line = draw_boxes(image, boxes[:1], [0], colours=[(250, 250, 0)], zoom=zoom)
    plate = ((alone == (250, 250, 0)).all(axis=2) & ~(line == (250, 250, 0)).all(axis=2)).sum()
    share = shape[0] * shape[1] * zoom**2 / 6
    assert yellow - lines.sum() > 0.75 * min(30 * plate, share)


def test_a_long_caption_is_never_cut_off():
    caption = "a class whose name is far too long for a picture of this size, and still is shown 0.87"
    small = np.full((60, 60, 3), 128, dtype=np.uint8)
    picture = draw_boxes(small, np.array([[30, 30, 60, 60]]), [1], [caption])
    plate = (picture == class_colour(1)).all(axis=2)
    columns = plate.sum(axis=0) > 3
    ink = (picture == 0).all(axis=2) & columns[None]
    assert ImageFont.load_default(size=11).getlength(caption) <= picture.shape[1]
    assert columns.sum() > ImageFont.load_default(size=11).getlength(caption)
    assert ink[:, -6:].sum() == 0 or columns[-1]  # text ends before the picture does


def test_a_caption_moves_away_from_another_and_keeps_a_line_to_its_box():
    boxes = np.array([[100, 100, 130, 130]] * 12)
    picture = draw_boxes(GREY, boxes, range(12), ["caption"] * 12)
    for label in range(12):
        assert (picture == class_colour(label)).all(axis=2).sum() > 300, label


def test_a_title_is_never_cut_off():
    narrow = np.zeros((50, 40, 3), dtype=np.uint8)
    title = "a title much wider than its picture"
    sheet = side_by_side([narrow, narrow], [title, title])
    width = ImageFont.load_default(size=11).getlength(title)
    assert sheet.shape[1] >= 2 * width
    ink = (sheet[: sheet.shape[0] - 50].min(axis=2) < 100).any(axis=0)
    assert ink[: sheet.shape[1] // 2].sum() == pytest.approx(ink[sheet.shape[1] // 2 :].sum(), abs=3)


def test_letters_beyond_ascii_have_shapes_of_their_own():
    pytest.importorskip("matplotlib")  # brings a font that has them
    ground = np.full((400, 400, 3), 90, dtype=np.uint8)
    drawn = {text: draw_boxes(ground, [[50, 50, 350, 350]], [0], [text]).tobytes() for text in "äñØЖ"}
    assert len(set(drawn.values())) == 4


def test_very_long_pictures_are_not_enlarged_without_end():
    assert legible_zoom((40, 4000), ["cat 0.90"]) == 1
    assert legible_zoom((8, 2000), ["cat 0.90"]) == 2
