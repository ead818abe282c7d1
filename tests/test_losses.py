import math

import pytest
import torch
from conftest import load_golden
from torchvision.ops import sigmoid_focal_loss

from retinanet.anchors import Anchors
from retinanet.fused_loss import FusedFocalLoss
from retinanet.losses import FocalLoss, calc_iou, focal_loss, smooth_l1
from retinanet.matcher import BACKGROUND, IGNORE


@pytest.fixture
def golden():
    values = load_golden("loss")
    height, width = values["image_size"].tolist()
    values["anchors"] = Anchors()(torch.empty(1, 3, height, width))
    values["logits"].requires_grad_()
    values["deltas"].requires_grad_()
    return values


def run(golden, images=slice(None), criterion=None):
    criterion = FocalLoss() if criterion is None else criterion
    return criterion(
        golden["logits"][images], golden["deltas"][images], golden["anchors"], golden["annotations"][images]
    )


def test_losses_and_gradients_equal_the_originals(golden):
    class_loss, box_loss = run(golden)
    assert class_loss.shape == box_loss.shape == (1,)
    torch.testing.assert_close(class_loss, golden["class_loss"], rtol=1e-4, atol=0)
    torch.testing.assert_close(box_loss, golden["box_loss"], rtol=1e-4, atol=0)
    (class_loss + box_loss).backward()
    torch.testing.assert_close(golden["logits"].grad, golden["grad_logits"], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(golden["deltas"].grad, golden["grad_deltas"], rtol=1e-4, atol=1e-8)


def per_image(criterion, logits, deltas, anchors, annotations):
    assigned = criterion.assign(anchors, annotations, logits.shape[-1])
    return criterion.of_assigned(logits, deltas, anchors, *assigned)


def test_losses_of_each_image_equal_the_originals(golden):
    outputs = golden["logits"], golden["deltas"], golden["anchors"], golden["annotations"]
    class_loss, box_loss = per_image(FocalLoss(), *outputs)
    torch.testing.assert_close(class_loss.double(), golden["class_loss_per_image"], rtol=1e-4, atol=0)
    torch.testing.assert_close(box_loss.double(), golden["box_loss_per_image"], rtol=1e-4, atol=1e-6)


def test_batch_equals_image_by_image(golden):
    together = torch.cat(run(golden))
    alone = torch.stack([torch.cat(run(golden, slice(image, image + 1))) for image in range(4)])
    torch.testing.assert_close(together, alone.mean(dim=0))


def test_padding_rows_change_nothing(golden):
    expected = torch.cat(run(golden))
    golden["annotations"] = torch.cat([golden["annotations"], torch.full((4, 20, 5), -1.0)], dim=1)
    torch.testing.assert_close(torch.cat(run(golden)), expected)


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.5, 0.0), (0.75, 1.5), (0.25, 5.0)])
def test_focal_loss_equals_torchvision(alpha, gamma):
    logits = (4 * torch.randn(2, 50, 6)).requires_grad_()
    labels = torch.randint(-2, 6, (2, 50))
    targets = torch.nn.functional.one_hot(labels.clamp(min=0), 6).float() * (labels >= 0)[..., None]
    per_anchor = sigmoid_focal_loss(logits, targets, alpha, gamma).sum(dim=-1)
    expected = torch.where(labels == IGNORE, 0, per_anchor)  # [2, 50]
    ours = focal_loss(logits, labels, alpha, gamma)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    (grad,) = torch.autograd.grad(ours.sum(), logits)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_focal_loss_by_hand():
    logits = torch.zeros(1, 2, 1)  # p = 0.5: cross entropy log 2, weight (1 - 0.5)^2
    foreground, background = torch.tensor([[0, IGNORE]]), torch.tensor([[BACKGROUND, IGNORE]])
    assert focal_loss(logits, foreground).tolist() == [pytest.approx([0.25 * 0.25 * math.log(2), 0])]
    assert focal_loss(logits, background).tolist() == [pytest.approx([0.75 * 0.25 * math.log(2), 0])]


def test_an_easy_example_weighs_a_hundredth_at_gamma_2():  # the paper's example, p_t = 0.9
    logits, label = torch.logit(torch.tensor([[0.9]])), torch.tensor([0])
    ratio = focal_loss(logits, label, gamma=2.0) / focal_loss(logits, label, gamma=0.0)
    assert ratio.item() == pytest.approx(1 / 100, rel=1e-4)


@pytest.mark.parametrize("logit", [-12.0, -80.0, 12.0, 80.0])
def test_gradients_live_where_the_originals_vanish(logit):
    logits = torch.full((1, 1, 1), logit, requires_grad=True)
    for label in (0, BACKGROUND):
        loss = focal_loss(logits, torch.tensor([[label]]))
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and grad.isfinite().all()
        wrong = (label == 0) == (logit < 0)
        if wrong:
            assert grad.abs().item() > 0.2  # the original: 0, so that training sticks at 2.302


def test_smooth_l1_by_hand():
    deltas = torch.tensor([[0.05, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    expected = (0.5 * 9 * 0.05**2 + (1 - 0.5 / 9)) / 4
    assert smooth_l1(deltas, torch.zeros(2, 4)).tolist() == pytest.approx([expected, 0])


def test_images_without_boxes_are_negatives():
    anchors = Anchors()(torch.empty(1, 3, 64, 64))
    logits = torch.zeros(2, anchors.shape[1], 3, requires_grad=True)
    deltas = torch.ones(2, anchors.shape[1], 4, requires_grad=True)
    for annotations in (torch.full((2, 1, 5), -1.0), torch.zeros(2, 0, 5)):
        class_loss, box_loss = FocalLoss()(logits, deltas, anchors, annotations)
        # not divided by anything, as in the original
        assert class_loss.item() == pytest.approx(logits[0].numel() * 0.75 * 0.25 * math.log(2), rel=1e-4)
        assert box_loss.item() == 0
        (class_loss + box_loss).backward()
        assert logits.grad.min() > 0 and not deltas.grad.any()


def test_best_match_rule_adds_an_anchor():
    anchors = torch.tensor([[[0.0, 0.0, 100.0, 100.0]]])
    annotations = torch.tensor([[[0.0, 0.0, 45.0, 100.0, 0.0]]])  # IoU 0.45
    outputs = torch.zeros(1, 1, 1), torch.zeros(1, 1, 4), anchors, annotations
    assert [loss.item() for loss in FocalLoss()(*outputs)] == [0, 0]
    class_loss, box_loss = FocalLoss(best_match_iou=0.4)(*outputs)
    assert class_loss.item() == pytest.approx(0.25 * 0.25 * math.log(2)) and box_loss.item() > 0


def test_assignment_gives_labels_and_boxes():
    anchors = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 45, 100], [50, 50, 60, 60]]])
    annotations = torch.tensor([[[0.0, 0, 10, 9, 3], [0, 0, 100, 100, 1]], [[-1.0] * 5, [-1.0] * 5]])
    labels, boxes = FocalLoss().assign(anchors, annotations, 5)
    assert labels.tolist() == [[3, IGNORE, BACKGROUND], [BACKGROUND] * 3]
    assert boxes[0, 0].tolist() == [0, 0, 10, 9]


def test_calc_iou_is_the_originals():
    anchors, boxes = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[5.0, 0, 15, 10], [0, 0, 10, 10]])
    assert calc_iou(anchors, boxes).tolist() == [pytest.approx([1 / 3, 1])]


@pytest.mark.parametrize("label", [2, 7, -2, 0.5, math.nan, math.inf])
def test_a_label_that_is_not_a_class_is_an_error_that_names_both(label):
    outputs = torch.zeros(1, 1, 2), torch.zeros(1, 1, 4), torch.tensor([[[0.0, 0.0, 9.0, 9.0]]])
    with pytest.raises(ValueError, match=f"annotations have label {label}, but the classes are 0 to 1"):
        FocalLoss()(*outputs, torch.tensor([[[0.0, 0.0, 9.0, 9.0, label]]]))


def test_annotations_of_another_shape_are_refused():
    outputs = torch.zeros(1, 1, 2), torch.zeros(1, 1, 4), torch.tensor([[[0.0, 0.0, 9.0, 9.0]]])
    with pytest.raises(ValueError, match=r"annotations must be \[B, G, 5\] .*, not \[1, 2, 4\]"):
        FocalLoss()(*outputs, torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="not finite"):
        FocalLoss()(*outputs, torch.tensor([[[0.0, 0.0, math.nan, 9.0, 1.0]]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_default_type_of_the_caller_changes_nothing(golden, dtype):
    expected = torch.cat(run(golden))
    torch.set_default_dtype(dtype)
    try:
        found = torch.cat(run(golden)), torch.cat(run(golden, criterion=FusedFocalLoss()))
    finally:
        torch.set_default_dtype(torch.float32)
    for losses in found:
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
