import numpy as np
import pytest
import torch
from boxes_data import make_dataset, plates, random_boxes
from helpers import write_csv_data

from retinanet.anchors import Anchors
from retinanet.boxes import box_iou
from retinanet.data.csv import CSVDataset
from retinanet.data.transforms import Resizer
from retinanet.matcher import match_anchors
from retinanet.training.foreign_weights import CellAnchors
from retinanet.visual import anchor_fit


@pytest.mark.parametrize(
    "anchors",
    [
        Anchors(),
        Anchors(ratios=[0.3, 1.7], scales=[0.5]),
        CellAnchors([[[-10.0, -20.0, 50.0, 14.0], [0.0, 0.0, 30.0, 30.0]]] * 5),  # off the middle of their location
    ],
    ids=["default", "others", "explicit"],
)
def test_best_ious_are_those_over_all_anchors(anchors):
    dataset = make_dataset(random_boxes(60), size=(333, 511), num_images=1)
    boxes = anchor_fit.resized_boxes(dataset, 256, 640)
    height, width = (int(side) for side in boxes.input_sizes[0])
    every_anchor = anchors(torch.empty(1, 3, height, width))[0]
    expected = box_iou(torch.from_numpy(boxes.boxes).float(), every_anchor).amax(dim=1)
    np.testing.assert_allclose(anchor_fit.best_ious(boxes, anchors), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("size", [(480, 640), (1200, 300), (37, 53), (608, 608)])
def test_boxes_and_sizes_are_those_of_the_resizer(size):
    dataset = make_dataset([[3, 4, 25, 30]], size=size)
    sample = {"img": np.zeros((*size, 3), np.uint8), "annot": dataset.load_annotations(0)}
    resized = Resizer(200, 333)(sample)
    boxes = anchor_fit.resized_boxes(dataset, 200, 333)
    np.testing.assert_allclose(boxes.boxes, resized["annot"][:, :4].numpy(), rtol=1e-5)
    assert tuple(boxes.input_sizes[0]) == resized["img"].shape[:2]
    assert boxes.scales[0] == pytest.approx(resized["scale"])


def test_a_box_within_reach_is_one_that_the_matcher_gives_an_anchor():
    for box in random_boxes(20, widths=(10, 60)):
        dataset = make_dataset([box])
        fit = anchor_fit.measure(dataset, Anchors(), 480, 1024)
        row = torch.tensor([[[*fit.boxes.boxes[0], 0]]], dtype=torch.float32)
        matches = match_anchors(Anchors()(torch.empty(1, 3, 480, 640))[0], row)
        assert (matches >= 0).any().item() == (not fit.unreachable[0])


def test_the_smallest_square_within_reach_is_the_root_of_half_the_smallest_anchor():
    assert anchor_fit.smallest_side(Anchors()) == pytest.approx(32 * 0.5**0.5, abs=0.1)
    assert anchor_fit.smallest_side(Anchors(scales=[0.5, 1])) == pytest.approx(16 * 0.5**0.5, abs=0.1)


def test_coverage_counts_boxes():
    # Of side 64 at a location of P4, 20 in the middle of one of P3 (IoU 400 / 1024), and 4.
    dataset = make_dataset([[8, 8, 72, 72], [90, 90, 110, 110], [10, 10, 14, 14]], [0, 1, 1], size=(480, 480))
    fit = anchor_fit.measure(dataset, Anchors(), 480, 1024)
    np.testing.assert_allclose(fit.iou, [1, 400 / 1024, 16 / 1024], atol=1e-6)
    assert (fit.coverage(0.5), fit.coverage(0.39)) == pytest.approx((1 / 3, 2 / 3))
    assert fit.unreachable.tolist() == [False, True, True]
    groups = fit.groups()
    assert groups["class"]["other"].tolist() == [False, True, True]
    sizes = {name: chosen.tolist() for name, chosen in groups["side after resizing"].items() if chosen.any()}
    assert sizes == {"0-16 px": [0, 0, 1], "16-32 px": [0, 1, 0], "64-128 px": [1, 0, 0]}


def test_the_best_match_rule_reaches_more():
    dataset = make_dataset([[89.5, 89.5, 110.5, 110.5]], size=(480, 480))  # IoU 441 / 1024 = 0.43
    assert anchor_fit.measure(dataset, Anchors(), 480, 1024).unreachable_share == 1
    assert anchor_fit.measure(dataset, Anchors(), 480, 1024, best_match_iou=0.4).unreachable_share == 0


def test_the_search_reaches_wide_boxes():
    fit, better, _ = plates()
    assert better.unreachable_share <= fit.unreachable_share - 0.2
    assert better.anchors.num_anchors == fit.anchors.num_anchors and better.anchors.sizes == fit.anchors.sizes
    np.testing.assert_allclose(better.iou, anchor_fit.best_ious(fit.boxes, better.anchors))


def test_the_search_keeps_anchors_that_fit():
    # Boxes that are anchors: no others can be better.
    anchors = Anchors()(torch.empty(1, 3, 256, 256))[0]
    inside = anchors[(anchors.min(dim=1).values >= 0) & (anchors.max(dim=1).values <= 256)][::37]
    fit = anchor_fit.measure(make_dataset(inside.numpy(), size=(256, 256)), Anchors(), 256, 1024)
    assert fit.iou.min() == pytest.approx(1, abs=1e-4)
    assert anchor_fit.search(fit) is fit


def test_boxes_are_measured_as_training_sees_them(tmp_path):
    lines = ["a.png,-90,8,24,40,circle", "a.png,70,0,90,9,circle", "b.png,,,,,"]  # partly and wholly outside
    data = CSVDataset(*write_csv_data(tmp_path, lines), Resizer(96, 1000))
    boxes = anchor_fit.resized_boxes(data, 96, 1000)
    assert boxes.boxes.tolist() == data[0]["annot"][:, :4].tolist() == [[0, 16, 48, 80]]
