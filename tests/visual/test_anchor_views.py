import numpy as np
import pytest
import torch
from helpers import gradient

from retinanet.anchors import Anchors
from retinanet.matcher import IGNORE, match_anchors
from retinanet.visual import anchor_views
from retinanet.visual.drawing import class_colour, draw_boxes, enlarge

NAMES = ["circle", "rectangle", "triangle"]
BLACK = np.zeros((608, 608, 3), np.uint8)
NO_BOXES = np.zeros((0, 5), np.float32)


def centres(picture, anchors):
    """Colours at the centres of anchors."""
    x, y = ((anchors[:, :2] + anchors[:, 2:]) / 2).long().T
    return {tuple(colour) for colour in picture[y, x].tolist()}


@pytest.mark.parametrize("best_match_iou", [None, 0.4])
def test_the_anchors_that_are_drawn_are_those_that_the_matcher_assigns(best_match_iou):
    annotations = np.array([[100, 100, 220, 210, 0], [300, 300, 420, 360, 1], [500, 20, 521, 41, 2]], dtype=np.float32)
    anchors = Anchors().of_size(608, 608)
    matches = match_anchors(anchors, torch.from_numpy(annotations)[None], best_match_iou)[0]
    picture = anchor_views.draw_matches(BLACK, annotations, anchors, NAMES, best_match_iou)
    bar, start = picture.shape[0] - 608, (picture.shape[1] + 6) // 2
    left, right = picture[bar:, :608], picture[bar:, start : start + 608]
    for row in range(2):  # the caption of the last one covers its centres
        assert class_colour(row) in centres(left, anchors[matches == row])
    assert anchor_views.BLUE in centres(right, anchors[matches == IGNORE])
    assert (left == anchor_views.RED).all(axis=2).any() == (best_match_iou is None)


def test_a_box_without_a_positive_anchor_is_red_and_says_its_best_iou():
    annotations = np.array([[300, 300, 312, 312, 1]], dtype=np.float32)
    picture = anchor_views.draw_matches(BLACK, annotations, Anchors().of_size(608, 608), NAMES)
    bar = picture.shape[0] - 608
    caption = ["rectangle: 0, best IoU 0.14"]
    expected = draw_boxes(BLACK, annotations[:, :4], [1], caption, ["dotted"], [anchor_views.RED])
    plate = (expected == anchor_views.RED).all(axis=2)
    assert plate.sum() > 500 and (picture[bar:, :608][plate] == anchor_views.RED).all()
    assert anchor_views.RED not in {class_colour(label) for label in range(100)}


def test_images_without_boxes():
    picture = anchor_views.draw_matches(gradient(64, 64), NO_BOXES, Anchors().of_size(64, 64), NAMES)
    np.testing.assert_array_equal(picture[-640:, :640], enlarge(gradient(64, 64), 10))
    assert anchor_views.draw_anchors(gradient(64, 64), NO_BOXES, Anchors()).dtype == np.uint8


@pytest.mark.parametrize("place", [(56, 88), (248, 216)])
def test_the_anchors_of_the_location_that_fits_best_are_drawn_for_each_level(place):
    # The square anchor of scale 1 of a location of P4.
    x, y = place
    annotations = np.array([[x, y, x + 64, y + 64, 0]], dtype=np.float32)
    sheet = anchor_views.draw_anchors(BLACK, annotations, Anchors())
    # P4 is the second panel of three in a row; its image has a frame, and is scaled to the cell.
    scale = 640 / (608 + 2 * anchor_views.FRAME)
    gap = max(4, 640 // 60)
    panel = sheet[: sheet.shape[0] // 2, 640 + 2 * gap : 1280 + 2 * gap]
    for number, colour in enumerate(anchor_views.RATIO_COLOURS):
        rows, columns = (panel == colour).all(axis=2).nonzero()
        ratio = 2.0 ** (number - 1)
        half_width, half_height = 32 * 4 ** (1 / 3) / ratio**0.5, 32 * 4 ** (1 / 3) * ratio**0.5
        assert np.ptp(columns) + 1 == pytest.approx(2 * half_width * scale, abs=2)
        assert np.ptp(rows) + 1 == pytest.approx(2 * half_height * scale, abs=2)
        assert (columns.min() + columns.max() + 1) / 2 == pytest.approx((x + 32 + anchor_views.FRAME) * scale, abs=2)


def test_tiles_are_bright_their_margins_dimmed_and_the_rest_dark():
    annotations = np.array([[20, 20, 60, 60, 0]], dtype=np.float32)  # on P3, in the tile of the first 64 x 64 pixels
    white = np.full((608, 800, 3), 255, np.uint8)
    sheets = [anchor_views.draw_tiles(white, boxes, Anchors()) for boxes in (annotations, NO_BOXES)]
    dimmed, without = ((sheet == 127).all(axis=2).sum() for sheet in sheets)
    side = 640 / 800 * 8  # pixels of a location of P3 in a cell of the sheet
    assert dimmed - without == pytest.approx((13**2 - 8**2) * side**2, rel=0.1)
    assert all((sheet == 51).all(axis=2).sum() > 100_000 for sheet in sheets)
