"""The CUDA path: on fake tensors, which have devices and shapes but no numbers, and on a GPU if there is one.

A fake tensor raises if its numbers are read back to the host, and if devices are mixed. Backward passes need a real
device.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from retinanet import sparse_head
from retinanet.data.transforms import normalize
from retinanet.losses import FocalLoss
from retinanet.model import resnet18

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def fake_cuda():
    """Within the test, new tensors are fake and on a GPU, where networks compute in bfloat16."""
    # torch.autocast disables itself if there is no GPU.
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(), torch.device("cuda"):
            yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def make_batch(num_boxes):
    return normalize(torch.empty(2, 3, 128, 160, dtype=torch.uint8)), torch.empty(2, num_boxes, 5)


@pytest.mark.parametrize("num_boxes", [0, 1, 50])
@pytest.mark.parametrize("best_match_iou", [None, 0.4])
def test_the_training_forward_stays_on_the_gpu_and_reads_nothing_back(
    fake_cuda, monkeypatch, num_boxes, best_match_iou
):
    # Only the number of tiles that the box head needs is read back, early and separately.
    monkeypatch.setattr(sparse_head.Plan, "numbers", lambda self: [2] * len(self.levels))
    net = resnet18(3).train()
    net.freeze_bn()
    net.focalLoss.best_match_iou = best_match_iou
    images, annotations = make_batch(num_boxes)
    assert net.pyramid(images)[0].dtype == torch.bfloat16
    losses = net([images, annotations])
    for loss in losses:
        assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.requires_grad


def test_the_plain_criterion_stays_on_the_gpu(fake_cuda):
    net = resnet18(3).train()
    images, annotations = make_batch(5)
    for loss in FocalLoss()(*net.heads(images), annotations):
        assert loss.device.type == "cuda"


def test_detection_reads_back_its_candidates_and_nothing_before(fake_cuda):
    net = resnet18(3).eval()
    with pytest.raises(DynamicOutputShapeException) as error:
        net.detect(make_batch(0)[0])
    assert any(entry.name == "best_candidates" for entry in error.traceback)


@NEEDS_GPU
def test_losses_and_gradients_on_a_gpu_are_those_of_the_cpu():
    net = resnet18(3).train()
    net.freeze_bn()
    torch.nn.init.normal_(net.regressionModel.output.weight, std=0.05)
    images, annotations = torch.randn(2, 3, 128, 160), torch.tensor([[[8.0, 8, 60, 90, 1]], [[-1.0] * 5]])
    expected = torch.cat(net([images, annotations]))
    expected_grad = torch.autograd.grad(expected.sum(), net.conv1.weight)[0]
    net.cuda()
    found = torch.cat(net([images.cuda(), annotations.cuda()]))
    grad = torch.autograd.grad(found.sum(), net.conv1.weight)[0]
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)
    assert (grad.cpu() - expected_grad).norm() < 1e-2 * expected_grad.norm()


@NEEDS_GPU
def test_detections_on_a_gpu_are_those_of_the_cpu(filled_net):
    import copy

    image = torch.randn(1, 3, 128, 160)
    expected = filled_net.detect(image)[0]
    found = copy.deepcopy(filled_net).cuda().detect(image.cuda())[0]
    torch.testing.assert_close(found.scores[:20].cpu(), expected.scores[:20], rtol=1e-3, atol=1e-3)
