"""The sparse box head equals the dense one where its output is needed: in losses, gradients and detections."""

import copy

import pytest
import torch

from retinanet import sparse_head
from retinanet.losses import FocalLoss
from retinanet.model import RegressionModel, resnet18
from retinanet.postprocess import best_candidates, select_detections

SHAPES = [(28, 40), (14, 20), (7, 10), (4, 5), (2, 3)]


def lively_head():
    head = RegressionModel(8, num_anchors=2, feature_size=8)
    for weight in head.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return head


def random_needed(number):
    needed = torch.zeros(2, sum(2 * rows * columns for rows, columns in SHAPES), dtype=torch.bool)
    needed[torch.randint(2, (number,)), torch.randint(needed.shape[1], (number,))] = True
    return needed


def every_corner():
    """The first and the last anchor of each level of the first image, none of the second."""
    needed, start = random_needed(0), 0
    for rows, columns in SHAPES:
        needed[0, [start, start + 2 * rows * columns - 1]] = True
        start += 2 * rows * columns
    return needed


@pytest.mark.parametrize("needed", [random_needed(0), random_needed(1), random_needed(9), every_corner()])
def test_outputs_are_equal_to_the_bit_and_gradients_within_rounding(needed):
    head, pyramid = lively_head(), [torch.randn(2, 8, *shape, requires_grad=True) for shape in SHAPES]
    dense = torch.cat([head(level) for level in pyramid], dim=1)
    sparse = sparse_head.run(head, pyramid, sparse_head.Plan(needed, SHAPES))
    assert sparse.shape == dense.shape
    torch.testing.assert_close(sparse[needed], dense[needed], rtol=1e-6, atol=1e-7)
    weights = torch.randn(dense.shape) * needed[..., None]
    inputs = [*pyramid, *head.parameters()]
    for found, expected in zip(
        torch.autograd.grad((sparse * weights).sum(), inputs), torch.autograd.grad((dense * weights).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_level_is_dense_where_that_is_cheaper():
    tiles = sparse_head.Plan(random_needed(2000), SHAPES).tiles()
    assert tiles == [None] * 5
    tiles = sparse_head.Plan(random_needed(1), SHAPES).tiles()
    assert tiles[0] is not None and tiles[-1] is None  # the coarsest level keeps every weight in the graph


def test_tiles_are_those_that_contain_needed_anchors():
    needed = random_needed(0)
    needed[1, 2 * (9 * 40 + 17)] = True  # row 9, column 17 of the finest level: tile (1, 2)
    (image, corner), *_ = sparse_head.Plan(needed, SHAPES).tiles()
    assert image.tolist() == [1] and corner.tolist() == [[8, 16]]


def batch(num_boxes, size):
    """Images of `size` with `num_boxes` boxes each, some of them at the border."""
    height, width = size
    annotations = torch.full((len(num_boxes), max(1, *num_boxes), 5), -1.0)
    for row, number in zip(annotations, num_boxes, strict=True):
        corner = torch.rand(number, 2) * torch.tensor([width - 30.0, height - 30.0])
        corner[: number // 2] = 0
        boxes = torch.cat([corner, corner + 24 + 40 * torch.rand(number, 2)], dim=1)
        row[:number] = torch.cat([boxes, torch.randint(3, (number, 1))], dim=1)
    return torch.randn(len(num_boxes), 3, *size), annotations


@pytest.mark.parametrize(
    ("num_boxes", "size"), [((0, 0), (128, 160)), ((1, 0), (128, 160)), ((1, 3), (97, 203)), ((40, 1), (128, 160))]
)
def test_losses_and_gradients_equal_the_dense_ones(filled_net, num_boxes, size):
    images, annotations = batch(num_boxes, size)
    net = copy.deepcopy(filled_net).train()
    net.freeze_bn()
    dense = FocalLoss()(*net.heads(images), annotations)
    expected = torch.autograd.grad(sum(dense), net.parameters(), allow_unused=True)
    sparse = net([images, annotations])
    found = torch.autograd.grad(sum(sparse), net.parameters())  # every weight has a gradient, as DDP requires
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-7)
    for grad, plain in zip(found, expected, strict=True):
        assert (grad - plain).norm() <= 1e-5 * plain.norm() + 1e-9


def test_detections_equal_the_dense_ones(filled_net):
    net = copy.deepcopy(filled_net)
    net.classificationModel.output.bias.data -= 3.5  # few candidates
    images = torch.randn(2, 3, 320, 448)
    found = net.detect(images)
    logits, deltas, anchors = net.heads(images)
    sizes = net.anchors.level_sizes(320, 448)
    for detections, x, d in zip(found, logits, deltas, strict=True):
        expected = select_detections(best_candidates(x, sizes), x, d, anchors[0], (320, 448))
        assert len(expected.scores) > 0
        for values, others in zip(detections, expected, strict=True):
            torch.testing.assert_close(values, others, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_losses_at_full_size_equal_the_dense_ones():
    torch.manual_seed(0)
    net = resnet18(3).train()
    net.freeze_bn()
    torch.nn.init.normal_(net.regressionModel.output.weight, std=0.05)
    images, annotations = batch((7, 2), (608, 800))
    dense = FocalLoss()(*net.heads(images), annotations)
    torch.testing.assert_close(net([images, annotations]), dense, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_compiled_network_has_the_same_losses_and_gradients():
    net = resnet18(3).train()
    images, annotations = torch.randn(2, 3, 96, 96), torch.tensor([[[10.0, 10, 50, 50, 1]], [[20.0, 20, 70, 60, 0]]])
    losses, gradients = [], []
    for network in (net, torch.compile(net)):
        net.zero_grad()
        losses.append(torch.cat(network([images, annotations])))
        losses[-1].sum().backward()
        gradients.append([weight.grad.clone() for weight in net.parameters()])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
