import pytest
import torch

from retinanet import matcher
from retinanet.anchors import Anchors
from retinanet.boxes import box_iou
from retinanet.matcher import BACKGROUND, IGNORE, match_anchors


def overlapping(iou):
    """A box over the anchor (0, 0, 100, 100) with the given IoU, cut off at the right."""
    return [0.0, 0.0, 100.0 * iou, 100.0, 0.0]


ANCHOR = torch.tensor([[0.0, 0.0, 100.0, 100.0]])


@pytest.mark.parametrize(
    "iou, expected", [(0.9, 0), (0.5, 0), (0.49, IGNORE), (0.4, IGNORE), (0.39, BACKGROUND), (0.1, BACKGROUND)]
)
def test_thresholds(iou, expected):
    assert match_anchors(ANCHOR, torch.tensor([[overlapping(iou)]])).tolist() == [[expected]]


def test_the_best_box_wins_and_padding_never_does():
    annotations = torch.tensor(
        [[overlapping(0.6), overlapping(0.8), [-1.0] * 5], [overlapping(0.7), [-1.0] * 5, [-1.0] * 5]]
    )
    assert match_anchors(ANCHOR, annotations).tolist() == [[1], [0]]


def test_padding_rows_with_a_perfect_box_are_padding():
    assert match_anchors(ANCHOR, torch.tensor([[[0.0, 0.0, 100.0, 100.0, -1.0]]])).tolist() == [[BACKGROUND]]


def test_without_boxes_all_is_background():
    assert match_anchors(ANCHOR, torch.zeros(2, 0, 5)).tolist() == [[BACKGROUND], [BACKGROUND]]


def test_best_match_rule():
    anchors = torch.tensor([[0.0, 0.0, 100.0, 100.0], [0.0, 0.0, 120.0, 100.0]])
    annotations = torch.tensor([[overlapping(0.45), overlapping(0.2)]])
    assert match_anchors(anchors, annotations).tolist() == [[IGNORE, BACKGROUND]]
    # The first anchor is the best of both boxes, but overlaps the second one below 0.4; 0.375 is background.
    assert match_anchors(anchors, annotations, best_match_iou=0.4).tolist() == [[0, BACKGROUND]]


def test_chunks_change_nothing(monkeypatch):
    anchors = Anchors()(torch.empty(1, 3, 128, 160))[0]
    corner = torch.rand(3, 40, 2) * 100
    boxes = torch.cat([corner, corner + torch.rand(3, 40, 2) * 80 + 10, torch.zeros(3, 40, 1)], dim=-1)
    boxes[1, 30:] = -1
    whole = [match_anchors(anchors, boxes, rule) for rule in (None, 0.4)]
    monkeypatch.setattr(matcher, "CPU_CHUNK", 7 * 3 * len(anchors))
    for rule, expected in zip((None, 0.4), whole, strict=True):
        assert torch.equal(match_anchors(anchors, boxes, rule), expected)
    iou = box_iou(anchors, boxes[0, :, :4])  # the rule as the paper states it
    best, index = iou.max(dim=1)
    expected = torch.where(best >= 0.5, index, torch.where(best < 0.4, BACKGROUND, IGNORE))
    assert torch.equal(whole[0][0], expected)


def test_with_a_limit_of_zero_padding_and_boxes_apart_get_no_anchors():
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 30, 30]])
    boxes = torch.tensor([[[0.0, 0, 4, 4, 0], [90, 90, 99, 99, 0], [-1, -1, -1, -1, -1]]])
    assert match_anchors(anchors, boxes, best_match_iou=0).tolist() == [[0, BACKGROUND]]
