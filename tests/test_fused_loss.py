"""The fused loss equals the plain one in value and gradient: any shape, any precision, at every border of a chunk."""

import pytest
import torch

from retinanet import fused_loss
from retinanet.anchors import Anchors
from retinanet.fused_loss import FusedFocalLoss, fused_focal_loss
from retinanet.losses import FocalLoss, focal_loss


def gradients(function, *inputs):
    """The value of a function of some tensors, weighted at random, and its gradients."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    values = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.rand(value.shape, generator=generator) for value in values]
    total = sum((value * weight).sum() for value, weight in zip(values, weights, strict=True))
    return values, torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5, 2.0, 5.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 50, 6), (3, 33, 1), (2, 700, 80)])
def test_class_loss_equals_the_plain_one(shape, gamma):
    logits, labels = 5 * torch.randn(shape), torch.randint(-2, shape[2], shape[:2])
    plain, plain_grads = gradients(lambda x: [focal_loss(x, labels, 0.3, gamma).sum(dim=1)], logits)
    fused, fused_grads = gradients(lambda x: [fused_focal_loss(x, labels, 0.3, gamma)], logits)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused_grads, plain_grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_precision_is_scored_in_float32(dtype):
    logits, labels = torch.randn(2, 200, 4).to(dtype), torch.randint(-2, 4, (2, 200))
    fused, (grad,) = gradients(lambda x: [fused_focal_loss(x, labels)], logits)
    plain, (plain_grad,) = gradients(lambda x: [focal_loss(x, labels).sum(dim=1)], logits)
    assert fused[0].dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, plain_grad, rtol=2e-2, atol=1e-4)  # rounded to `dtype`


@pytest.mark.parametrize("chunk", [1, 3, 20, 21, 299, 300, 301, 10_000])
def test_chunk_borders_change_nothing(monkeypatch, chunk):
    logits, labels = torch.randn(2, 50, 3), torch.randint(-2, 3, (2, 50))
    expected = gradients(lambda x: [focal_loss(x, labels).sum(dim=1)], logits)
    monkeypatch.setattr(fused_loss, "CPU_CHUNK", chunk)
    found = gradients(lambda x: [fused_focal_loss(x, labels)], logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_finite_below_gamma_1():  # where the plain form's is not, once p_t is rounded to 1
    _, (grad,) = gradients(
        lambda x: [fused_focal_loss(x, torch.tensor([[0, -1]]), gamma=0.5)], torch.tensor([[[30.0], [-30.0]]])
    )
    assert grad.isfinite().all()


def random_batch(num_boxes):
    """Outputs and annotations of three images of 96 x 128 pixels with `num_boxes` boxes each."""
    anchors = Anchors()(torch.empty(1, 3, 96, 128))
    annotations = torch.full((3, max(num_boxes), 5), -1.0)
    for row, count in zip(annotations, num_boxes, strict=True):
        corner = torch.rand(count, 2) * 60
        boxes = torch.cat([corner, corner + 15 + torch.rand(count, 2) * 40], dim=1)
        row[:count] = torch.cat([boxes, torch.randint(0, 5, (count, 1))], dim=1)
    return torch.randn(3, anchors.shape[1], 5), torch.randn(3, anchors.shape[1], 4), anchors, annotations


@pytest.mark.parametrize("best_match_iou", [None, 0.4, 0.0])
@pytest.mark.parametrize("num_boxes", [(3, 0, 1), (0, 0, 0), (20, 20, 20)])
def test_the_criterion_equals_the_plain_one(num_boxes, best_match_iou):
    logits, deltas, anchors, annotations = random_batch(num_boxes)
    results = []
    for kind in (FocalLoss, FusedFocalLoss):
        criterion = kind(best_match_iou=best_match_iou)
        assigned = criterion.assign(anchors, annotations, logits.shape[-1])
        per_image = criterion.of_assigned(logits, deltas, anchors, *assigned)
        results.append((per_image, gradients(lambda *x: criterion(*x, anchors, annotations), logits, deltas)))  # noqa: B023
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_all_rows_in_place_of_the_positive_ones_give_the_same(monkeypatch):  # as on a GPU
    logits, deltas, anchors, annotations = random_batch((3, 0, 1))
    expected = gradients(lambda *x: FusedFocalLoss()(*x, anchors, annotations), logits, deltas)
    monkeypatch.setattr(fused_loss, "positive_rows", lambda labels: torch.arange(labels.numel()))
    found = gradients(lambda *x: FusedFocalLoss()(*x, anchors, annotations), logits, deltas)
    torch.testing.assert_close(found, expected)


def test_backward_twice_is_refused():
    loss = fused_focal_loss(torch.zeros(1, 1, 1, requires_grad=True), torch.tensor([[0]])).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_a_gradient_scaler_reaches_small_gradients_of_float16():
    logits = torch.full((1, 1, 1), -6.0, dtype=torch.float16, requires_grad=True)
    (2.0**16 * fused_focal_loss(logits, torch.tensor([[-1]])).sum()).backward()
    reference = torch.full((1, 1, 1), -6.0, requires_grad=True)
    (2.0**16 * focal_loss(reference, torch.tensor([[-1]])).sum()).backward()
    torch.testing.assert_close(logits.grad.float(), reference.grad, rtol=1e-2, atol=0)
    assert logits.grad.item() != 0
