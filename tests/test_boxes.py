import math

import pytest
import torch
from conftest import load_golden
from torchvision import ops

from retinanet.boxes import (
    BBoxTransform,
    ClipBoxes,
    box_area,
    box_intersection,
    box_iou,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    xywh_to_xyxy,
    xyxy_to_xywh,
)


def random_boxes(*shape):
    corner, size = torch.rand(*shape, 2) * 100, torch.rand(*shape, 2) * 80 + 10
    return torch.cat([corner, corner + size], dim=-1)


def test_iou_by_hand():
    a = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    b = torch.tensor(
        [[0.0, 0.0, 10.0, 10.0], [5.0, 0.0, 15.0, 10.0], [10.0, 0.0, 20.0, 10.0], [30.0, 30.0, 40.0, 40.0]]
    )
    assert box_iou(a, b).tolist()[0] == pytest.approx([1, 50 / 150, 0, 0])


def test_intersection_and_area_by_hand():
    a = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    b = torch.tensor([[5.0, 0.0, 15.0, 10.0], [30.0, 30.0, 40.0, 50.0]])
    assert box_intersection(a, b).tolist() == [[50, 0]]
    assert box_area(b).tolist() == [100, 200]


def test_iou_equals_torchvision_and_broadcasts():
    a, b = random_boxes(4, 30), random_boxes(20)
    iou = box_iou(a, b)
    assert iou.shape == (4, 30, 20)
    for image in range(4):
        torch.testing.assert_close(iou[image], ops.box_iou(a[image], b))


def test_iou_of_empty_boxes_is_zero_not_nan():
    points = torch.tensor([[5.0, 5.0, 5.0, 5.0]])
    assert box_iou(points, points).item() == 0


def test_encode_by_hand():
    anchor = torch.tensor([0.0, 0.0, 10.0, 20.0])
    box = torch.tensor([5.0, 10.0, 25.0, 20.0])  # centre (15, 15), 20 x 10
    expected = [(15 - 5) / 10 / 0.1, (15 - 10) / 20 / 0.1, math.log(2) / 0.2, math.log(0.5) / 0.2]
    assert encode_boxes(anchor, box).tolist() == pytest.approx(expected)


def test_decode_inverts_encode():
    anchors, boxes = random_boxes(500), random_boxes(500)
    torch.testing.assert_close(decode_boxes(anchors, encode_boxes(anchors, boxes)), boxes, atol=1e-3, rtol=1e-5)


def test_boxes_below_a_pixel_have_finite_targets():
    anchor, point = torch.tensor([0.0, 0.0, 32.0, 32.0]), torch.tensor([16.0, 16.0, 16.0, 16.0])
    assert encode_boxes(anchor, point).tolist() == pytest.approx([0, 0, math.log(1 / 32) / 0.2, math.log(1 / 32) / 0.2])


def test_decode_and_clip_equal_the_originals():
    golden = load_golden("decode")
    boxes = decode_boxes(golden["anchors"], golden["deltas"])
    torch.testing.assert_close(boxes, golden["decoded"], atol=1e-3, rtol=0)
    torch.testing.assert_close(clip_boxes(boxes, *golden["image_size"].tolist()), golden["clipped"], atol=1e-3, rtol=0)


def test_the_originals_modules_give_its_values():
    golden = load_golden("decode")
    height, width = golden["image_size"].tolist()
    boxes = BBoxTransform()(golden["anchors"], golden["deltas"])
    torch.testing.assert_close(boxes, golden["decoded"], atol=1e-3, rtol=0)
    clipped = ClipBoxes()(boxes, torch.empty(1, 3, height, width))
    torch.testing.assert_close(clipped, golden["clipped"], atol=1e-3, rtol=0)


def test_bbox_transform_takes_another_scale():
    anchors, deltas = torch.tensor([[[0.0, 0.0, 10.0, 20.0]]]), torch.tensor([[[0.5, 0.0, 0.0, 0.0]]])
    moved = BBoxTransform(mean=torch.tensor([0.1, 0, 0, 0]), std=torch.ones(4))(anchors, deltas)
    assert moved[0, 0].tolist() == pytest.approx([6, 0, 16, 20])


def test_decode_never_overflows():
    boxes = decode_boxes(torch.tensor([0.0, 0.0, 16.0, 16.0]), torch.tensor([0.0, 0.0, 1e4, 1e4]))
    assert (boxes[2] - boxes[0]).item() == pytest.approx(1000)


def test_clip_keeps_x_within_width_and_y_within_height():
    assert clip_boxes(torch.tensor([-5.0, -5.0, 500.0, 500.0]), 100, 200).tolist() == [0, 0, 200, 100]


def test_xywh_and_back():
    boxes = torch.tensor([[1.0, 2.0, 11.0, 22.0]])
    assert xyxy_to_xywh(boxes).tolist() == [[1, 2, 10, 20]]
    torch.testing.assert_close(xywh_to_xyxy(xyxy_to_xywh(boxes)), boxes)
