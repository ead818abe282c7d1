import copy
import json
import math

import numpy as np
import pytest
import torch
from conftest import GOLDEN, load_golden

from retinanet import model
from retinanet.anchors import Anchors
from retinanet.boxes import box_iou
from retinanet.model import PyramidFeatures, RetinaNet, resnet, resnet18
from retinanet.postprocess import Detections
from retinanet.resnet import BasicBlock


def tiny_net(num_classes=2, **settings):
    torch.manual_seed(0)
    return RetinaNet(num_classes, BasicBlock, (1, 1, 1, 1), **settings)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_state_dict_is_the_originals(depth):
    expected = json.loads((GOLDEN / "state_dict_keys.json").read_text())[f"resnet{depth}"]
    with torch.device("meta"):
        state = getattr(model, f"resnet{depth}")(num_classes=80).state_dict()
    assert list(state) == list(expected)
    assert {key: list(value.shape) for key, value in state.items()} == expected


def test_forward_and_detections_equal_the_originals(filled_net):
    golden = load_golden("forward")
    height, width = golden["image_size"].tolist()
    images = np.random.default_rng(golden["image_seed"]).standard_normal((1, 3, height, width), dtype=np.float64)
    images = torch.from_numpy(images.astype(np.float32))
    with torch.no_grad():
        pyramid = filled_net.fpn(filled_net.backbone(images))
        logits, deltas, _ = filled_net.heads(images)
    for level, features in enumerate(pyramid, start=3):
        corner = golden[f"p{level}_corner"]
        torch.testing.assert_close(features[0, : len(corner), 0, 0], corner, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(deltas[:, ::11], golden["deltas"], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits.sigmoid()[:, ::11], golden["probabilities"], rtol=0, atol=1e-4)

    (found,) = filled_net.detect(images, top_k=None, max_detections=None)
    assert len(found.scores) == len(golden["scores"])
    close = (found.scores[:, None] - golden["scores"]).abs() < 1e-4
    same = found.labels[:, None] == golden["labels"]
    near = (found.boxes[:, None] - golden["boxes"]).abs().amax(dim=-1) < 0.05
    assert torch.equal((close & same & near).any(dim=0), torch.ones(len(golden["scores"]), dtype=torch.bool))


def test_detections_of_a_batch_are_those_of_its_images(filled_net):
    images = torch.randn(3, 3, 96, 128)
    together = filled_net.detect(images)
    for image, found in zip(images, together, strict=True):
        alone = filled_net(image[None])
        assert len(found.scores) > 10
        for ours, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


def test_calling_the_model_is_detect_exactly(filled_net):
    images = torch.randn(1, 3, 96, 128)
    for ours, expected in zip(filled_net(images), filled_net.detect(images)[0], strict=True):
        assert torch.equal(ours, expected)


def test_boxes_are_clipped_to_the_image_where_its_size_is_known(filled_net):
    images = torch.randn(1, 3, 96, 128)
    (whole,), (part,) = filled_net.detect(images), filled_net.detect(images, image_sizes=[(90, 70)])
    assert whole.boxes[:, 2].max() > 70 and part.boxes[:, 2].max() <= 70 and part.boxes[:, 3].max() <= 90


@pytest.mark.parametrize("height, width", [(64, 64), (65, 97), (33, 200), (1, 1)])
def test_any_size_works(height, width):
    net = tiny_net().eval()
    images = torch.randn(1, 3, height, width)
    logits, deltas, anchors = net.heads(images)
    assert logits.shape[1] == deltas.shape[1] == anchors.shape[1]
    assert isinstance(net.detect(images)[0], Detections)


def test_pyramid_upsampling_is_nearest_times_two():
    fpn = PyramidFeatures(4, 4, 4, feature_size=4)
    c3, c4, c5 = torch.randn(1, 4, 16, 24), torch.randn(1, 4, 8, 12), torch.randn(1, 4, 4, 6)
    up = torch.nn.Upsample(scale_factor=2, mode="nearest")
    p4 = fpn.P4_1(c4) + up(fpn.P5_1(c5))
    p3 = fpn.P3_1(c3) + up(p4)
    outputs = fpn([c3, c4, c5])
    torch.testing.assert_close(outputs[0], fpn.P3_2(p3))
    torch.testing.assert_close(outputs[1], fpn.P4_2(p4))
    assert [tuple(level.shape[-2:]) for level in outputs] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]


def test_head_outputs_are_in_the_anchors_order():
    """Only the output at row 1, column 2, anchor 5 fires: it must be the one that `Anchors` lists there."""
    head = model.RegressionModel(2, num_anchors=9, feature_size=2)
    head.output = torch.nn.Identity()
    for conv in (head.conv1, head.conv2, head.conv3, head.conv4):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    head.conv4 = torch.nn.Conv2d(2, 36, 1)
    torch.nn.init.zeros_(head.conv4.weight)
    torch.nn.init.zeros_(head.conv4.bias)
    head.conv4.weight.data[5 * 4 + 2, 0] = 1
    x = torch.zeros(1, 2, 3, 4)
    x[0, 0, 1, 2] = 1
    assert head(x)[0].nonzero().tolist() == [[(1 * 4 + 2) * 9 + 5, 2]]


def test_initialisation_starts_from_the_prior():
    net = tiny_net().eval()
    logits, deltas, _ = net.heads(torch.randn(1, 3, 64, 64))
    assert logits.sigmoid().flatten().tolist() == pytest.approx([0.01] * logits.numel())
    assert not deltas.any()
    weight = net.fpn.P3_2.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.05)


def test_training_returns_two_losses_and_reaches_every_weight():
    net = tiny_net().train()
    with torch.no_grad():
        for head in (net.classificationModel, net.regressionModel):
            head.output.weight.normal_(std=0.01)  # the initial zeros would pass on no gradient
    annotations = torch.tensor([[[5.0, 5.0, 50.0, 50.0, 1.0]]])
    class_loss, box_loss = net([torch.randn(1, 3, 64, 64), annotations])
    assert class_loss.shape == box_loss.shape == (1,)
    (class_loss + box_loss).backward()
    assert [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_wrong_inputs_are_named():
    net = tiny_net().eval()
    images = torch.randn(2, 3, 64, 64)
    with pytest.raises(ValueError, match="detect"):
        net(images)
    with pytest.raises(ValueError, match="train"):
        net([images, torch.zeros(2, 1, 5)])
    with pytest.raises(ValueError, match="annotations"):
        net.train()(images)
    with pytest.raises(ValueError, match="depth"):
        resnet(20, 3)
    with pytest.raises(ValueError, match="num_classes"):
        resnet18(0)


def test_frozen_bn_stays_frozen_through_train():
    net = tiny_net()
    net.freeze_bn()
    before = net.bn1.running_mean.clone()
    net.train()
    assert net.training and not net.bn1.training
    net([torch.randn(1, 3, 64, 64), torch.full((1, 1, 5), -1.0)])
    assert torch.equal(net.bn1.running_mean, before)
    assert net.bn1.weight.requires_grad
    net.freeze_bn(False)
    assert net.bn1.training


def test_pretrained_loads_the_backbone_and_freezes_bn(monkeypatch):
    state = {
        key: value + 1 for key, value in resnet18(2).state_dict().items() if key.startswith(("conv1", "bn1", "layer"))
    }
    monkeypatch.setattr(model, "imagenet_weights", lambda depth, version: state)
    net = resnet18(2, pretrained=True)
    assert torch.equal(net.layer3[1].conv2.weight, state["layer3.1.conv2.weight"])
    assert net.bn_frozen


def test_anchor_settings_change_the_heads_and_the_boxes():
    net = tiny_net(anchors=Anchors(ratios=[1], scales=[1, 1.5])).eval()
    logits, deltas, anchors = net.heads(torch.randn(1, 3, 64, 64))
    assert logits.shape[1] == deltas.shape[1] == anchors.shape[1] == 2 * (64 + 16 + 4 + 1 + 1)


def test_channels_last_and_bf16_give_the_same_answer(filled_net):
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        logits, _, _ = filled_net.heads(images)
        again, _, _ = filled_net.heads(images.contiguous(memory_format=torch.channels_last))
        with torch.autocast("cpu", torch.bfloat16):
            low, _, anchors = filled_net.heads(images)
    torch.testing.assert_close(again, logits, rtol=1e-3, atol=1e-3)
    assert anchors.dtype == torch.float32
    assert (low.float() - logits).abs().mean() < 0.1 * logits.std()


def test_nms_leaves_no_pair_of_a_class_overlapping(filled_net):
    (found,) = filled_net.detect(torch.randn(1, 3, 96, 96), nms_threshold=0.3, max_detections=None)
    for label in range(3):
        boxes = found.boxes[found.labels == label]
        assert box_iou(boxes, boxes).fill_diagonal_(0).max() <= 0.3 + 1e-5


def test_anchors_of_other_levels_are_refused():
    with pytest.raises(ValueError, match=r"strides of anchors must be \[8, .*, 128\], not \[8, 16, 32\]"):
        model.resnet18(2, anchors=Anchors(pyramid_levels=[3, 4, 5]))


def test_synchronised_batchnorm_is_frozen_too():
    net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.resnet18(2))
    net.freeze_bn()
    assert not net.train().bn1.training


@pytest.mark.parametrize("change", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
def test_a_network_of_another_type_detects(filled_net, change):
    image = torch.randn(1, 3, 64, 96)
    expected = filled_net.detect(image)[0]
    found = change(copy.deepcopy(filled_net)).detect(image)[0]
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    torch.testing.assert_close(found.scores[:5], expected.scores[:5], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("number", range(5))
def test_frozen_stages_are_not_trained(number):
    net = resnet18(2).train()
    net.freeze_bn(affine=number == 2)
    net.freeze_stages(number)
    sum(net([torch.randn(1, 3, 64, 64), torch.tensor([[[4.0, 4, 40, 40, 1]]])])).backward()
    stages = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",)]
    frozen = [name for names in stages[:number] for name in names]
    for name, weight in net.named_parameters():
        is_norm = "bn" in name or "downsample.1" in name
        fixed = name.split(".")[0] in frozen or (number == 2 and is_norm)
        assert (weight.grad is None) == fixed, name


def test_there_are_four_stages_to_freeze():
    with pytest.raises(ValueError, match="0 to 4 stages can be frozen, not 5"):
        resnet18(2).freeze_stages(5)
