import copy
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import (
    RetinaNet,
    RetinaNet_ResNet50_FPN_Weights,
    retinanet_resnet50_fpn_v2,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retinanet.anchors import Anchors
from retinanet.boxes import DELTA_STD
from retinanet.errors import UserError
from retinanet.model import resnet18 as retinanet_resnet18
from retinanet.training import checkpoint, foreign_weights, weights


def assert_same_model(net, original):
    assert net.state_dict().keys() == original.state_dict().keys()
    for key, value in original.state_dict().items():
        assert torch.equal(net.state_dict()[key], value), key
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for output, expected in zip(net.heads(image), original.heads(image), strict=True):
            assert torch.equal(output, expected)


@torch.no_grad()
def enliven(net):
    """Random weights that give distinct outputs on all levels and for all classes."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in net.state_dict().items():
        if tensor.dim() == 4:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.dim() == 1:
            tensor.normal_(1.0 if name.endswith(("bn1.weight", "bn2.weight")) else 0.0, 0.1, generator=generator)
    net.eval()
    outputs = net.head(list(net.backbone(torch.randn(1, 3, 64, 96, generator=generator)).values()))
    net.head.classification_head.cls_logits.weight.div_(outputs["cls_logits"].std())
    net.head.classification_head.cls_logits.bias.sub_(4.0)
    net.head.regression_head.bbox_reg.weight.mul_(0.2 / outputs["bbox_regression"].std())
    return net


def anchor_generator():
    sizes = [(size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))) for size in (32, 64, 128, 256, 512)]
    return AnchorGenerator(tuple(sizes), ((0.5, 1.0, 2.0),) * 5)


def resnet18_fpn(p6_channels, num_classes=4, norm_layer=nn.BatchNorm2d):
    """A RetinaNet built as users of torchvision build theirs."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=norm_layer,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(p6_channels, 256),
    )
    return enliven(RetinaNet(backbone, num_classes, anchor_generator=anchor_generator()))


@pytest.fixture(scope="module")
def with_p6_on_c5():
    return resnet18_fpn(512)


@pytest.fixture(scope="module")
def with_p6_on_p5():
    return resnet18_fpn(256)


@torch.no_grad()
def assert_equal_heads(source, net, labels):
    """Logits of the `labels` that were kept, and deltas, on an image with odd sides."""
    image = torch.randn(1, 3, 70, 100)
    expected = source.head(list(source.backbone(image).values()))
    logits, deltas, _ = net.heads(image)
    expected_logits = expected["cls_logits"][..., labels]
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5 * float(expected_logits.abs().max()))
    expected_deltas = expected["bbox_regression"]
    scale = float(expected_deltas.abs().max())
    torch.testing.assert_close(deltas * torch.tensor(DELTA_STD), expected_deltas, rtol=1e-5, atol=1e-5 * scale)
    assert expected_logits.std() > 0.1 and expected_deltas.std() > 0.01  # otherwise the comparison means nothing


def save(state, path):
    torch.save(state, path)
    return path


@pytest.mark.parametrize("fixture", ["with_p6_on_c5", "with_p6_on_p5"])
def test_a_torchvision_model_has_equal_outputs(tmp_path, request, fixture):
    source = request.getfixturevalue(fixture)
    net, info = checkpoint.load_model(save(source.state_dict(), tmp_path / "tv.pth"))
    assert net.fpn.P6.in_channels == (512 if fixture == "with_p6_on_c5" else 256)
    assert info["class_names"] == ["class 0", "class 1", "class 2", "class 3"]
    assert (info["min_side"], info["max_side"]) == (800, 1333)
    assert_equal_heads(source, net, slice(None))


@torch.no_grad()
def test_a_torchvision_model_finds_the_same(tmp_path, with_p6_on_p5):
    source = with_p6_on_p5
    source.transform.min_size, source.transform.max_size = (128,), 256
    source.detections_per_img = 10**6
    net, _ = checkpoint.load_model(save(source.state_dict(), tmp_path / "tv.pth"))
    image = torch.rand(3, 128, 256)  # torchvision's strides are the paper's where 128 divides the sides
    expected = source([image])[0]
    inside = (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(dim=1)  # torchvision also keeps lines
    expected = {key: values[inside] for key, values in expected.items()}
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (source.transform.image_mean, source.transform.image_std)
    )
    found = net.detect(((image - mean) / std)[None], max_detections=None)[0]
    assert len(found.scores) == len(expected["scores"]) > 20
    torch.testing.assert_close(found.scores, expected["scores"], rtol=1e-4, atol=1e-5)
    assert torch.equal(found.labels, expected["labels"])
    torch.testing.assert_close(found.boxes, expected["boxes"], rtol=0, atol=0.02)


def test_the_anchors_are_torchvisions(tmp_path, with_p6_on_c5):
    net, _ = checkpoint.load_model(save(with_p6_on_c5.state_dict(), tmp_path / "tv.pth"))
    shapes = [torch.zeros(1, 1, 256 // stride, 384 // stride) for stride in (8, 16, 32, 64, 128)]
    strides = [[torch.tensor(stride)] * 2 for stride in (8, 16, 32, 64, 128)]
    expected = torch.cat(anchor_generator().grid_anchors([shape.shape[-2:] for shape in shapes], strides))
    torch.testing.assert_close(net.anchors(torch.zeros(1, 3, 256, 384))[0], expected, rtol=0, atol=0)


@torch.no_grad()
def test_the_coco_weights_keep_the_classes_that_exist(tmp_path):
    # BatchNorm as in the COCO weights: frozen, without epsilon.
    source = resnet18_fpn(256, num_classes=91, norm_layer=lambda channels: FrozenBatchNorm2d(channels, eps=0.0))
    net, info = checkpoint.load_model(save(source.state_dict(), tmp_path / "coco.pth"))
    names = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert net.num_classes == len(info["class_names"]) == 80
    assert info["class_names"][:2] + info["class_names"][-1:] == ["person", "bicycle", "toothbrush"]
    assert_equal_heads(source, net, [names.index(name) for name in info["class_names"]])


def test_weights_of_old_torchvision_have_other_names(tmp_path, with_p6_on_c5):
    source = with_p6_on_c5
    old = {}
    for name, value in source.state_dict().items():
        name = (
            name.replace("blocks.0.0.", "blocks.0.")
            .replace("blocks.1.0.", "blocks.1.")
            .replace("blocks.2.0.", "blocks.2.")
        )
        for layer in (3, 2, 1, 0):
            name = name.replace(f"head.conv.{layer}.0.", f"head.conv.{2 * layer}.")
        old[name] = value
    assert "head.regression_head.conv.6.bias" in old and "backbone.fpn.inner_blocks.2.bias" in old
    net, _ = checkpoint.load_model(save(old, tmp_path / "old.pth"))
    assert_equal_heads(source, net, slice(None))


def test_a_converted_model_survives_saving(tmp_path, with_p6_on_p5):
    net, info = checkpoint.load_model(save(with_p6_on_p5.state_dict(), tmp_path / "tv.pth"))
    checkpoint.save(tmp_path / "ours.pt", checkpoint.model_entries(net, info["class_names"], 800, 1333))
    again, _ = checkpoint.load_model(tmp_path / "ours.pt")
    image = torch.randn(1, 3, 64, 96)
    for before, after in zip(net.heads(image), again.heads(image), strict=True):
        assert torch.equal(before, after)


def test_normalised_heads_are_refused_with_a_reason(tmp_path):
    with torch.device("meta"):
        state = retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict()
    state = {name: torch.zeros(1) for name in state}
    with pytest.raises(UserError, match=r"v2\.pth: .*GroupNorm in the heads.*use the weights of"):
        checkpoint.load_model(save(state, tmp_path / "v2.pth"))


def test_unknown_layers_are_refused_by_name(tmp_path, with_p6_on_c5):
    state = with_p6_on_c5.state_dict() | {"head.mask.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"m\.pth: .*it has head\.mask\.weight"):
        checkpoint.load_model(save(state, tmp_path / "m.pth"))


def test_a_classifier_gives_its_backbone(tmp_path):
    source = resnet18(weights=None)
    path = save(source.state_dict(), tmp_path / "resnet18.pth")
    net = retinanet_resnet18(2)
    head = net.classificationModel.conv1.weight.clone()
    assert "a backbone only" in weights.load_weights(net, path)
    assert torch.equal(net.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert torch.equal(net.classificationModel.conv1.weight, head)
    with pytest.raises(UserError, match="holds a ResNet-18 backbone"):
        checkpoint.load_model(path)


# Models of the original


class Original(nn.Module):
    """A module of the original's shape, whose class this library does not have."""

    def __init__(self, net):
        super().__init__()
        self.inplanes = 512
        for name, child in net.named_children():
            self.add_module(name, child)
        self.anchors = nn.Module()
        self.anchors.ratios = np.array([0.5, 1, 2])
        self.anchors.sizes = [32, 64]
        self.scale = np.float64(2.0)


def rename(module, name):
    """Let a module's class pickle under another name, as files of the original have it."""
    kind = type(name.rpartition(".")[2], (nn.Module,), {"__module__": name.rpartition(".")[0]})
    module.__class__ = kind
    sys.modules.setdefault(kind.__module__, types.ModuleType(kind.__module__))
    setattr(sys.modules[kind.__module__], kind.__name__, kind)


@pytest.fixture
def originals_model(filled_net, monkeypatch):
    """`filled_net` as a model of the original's old code, whose modules were no package (`import model`)."""
    for name in ("model", "anchors", "losses"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    whole = Original(copy.deepcopy(filled_net))
    rename(whole, "model.ResNet")
    rename(whole.fpn, "model.PyramidFeatures")
    rename(whole.regressionModel, "model.RegressionModel")
    rename(whole.classificationModel, "model.ClassificationModel")
    rename(whole.anchors, "anchors.Anchors")
    rename(whole.focalLoss, "losses.FocalLoss")
    return whole


@pytest.mark.parametrize(("prefix", "new_format"), [("", True), ("module.", False), ("module._orig_mod.", True)])
def test_a_state_dict_of_the_original_is_a_model(filled_net, tmp_path, prefix, new_format):
    state = {prefix + key: value for key, value in filled_net.state_dict().items()}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=new_format)
    net, info = checkpoint.load_model(tmp_path / "a.pt")
    assert_same_model(net, filled_net)
    assert info["class_names"] == ["class 0", "class 1", "class 2"]
    assert (info["min_side"], info["max_side"]) == (608, 1024)


def test_a_state_dict_without_batch_counters_or_in_a_wrapper_is_a_model(filled_net, tmp_path):
    state = {key: value for key, value in filled_net.state_dict().items() if "num_batches" not in key}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "a.pt")
    assert_same_model(checkpoint.load_model(tmp_path / "a.pt")[0], filled_net)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_whole_pickled_model_of_the_original_is_read_without_its_code(
    filled_net, originals_model, tmp_path, monkeypatch, caplog, parallel
):
    torch.save(nn.DataParallel(originals_model) if parallel else originals_model, tmp_path / "a.pt")
    for name in ("model", "anchors", "losses"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError):
        torch.load(tmp_path / "a.pt", weights_only=False)  # the error that the original's users get
    with caplog.at_level("INFO", logger="retinanet"):
        net, _ = checkpoint.load_model(tmp_path / "a.pt")
    assert_same_model(net, filled_net)
    assert "a whole pickled model, of which only the weights were read, ResNet-18, 3 classes" in caplog.text


@pytest.mark.parametrize("anchors", [Anchors(ratios=[1.0, 3.0], scales=[1.0]), foreign_weights.torchvision_anchors()])
def test_a_whole_pickled_model_of_this_library_keeps_its_anchors(tmp_path, anchors):
    net = retinanet_resnet18(2, anchors=anchors).eval()
    torch.save(net, tmp_path / "a.pt")
    again, _ = checkpoint.load_model(tmp_path / "a.pt")
    assert again.num_classes == 2 and again.anchors.settings() == net.anchors.settings()
    assert_same_model(again, net)


def test_another_pickled_module_is_not_a_retinanet(tmp_path):
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: holds a Sequential, which is not a complete RetinaNet"):
        checkpoint.load_model(tmp_path / "a.pt")


def test_a_stand_in_can_do_nothing(filled_net, tmp_path):
    torch.save(filled_net, tmp_path / "a.pt")
    content = checkpoint.load(tmp_path / "a.pt")
    assert isinstance(content, foreign_weights.StandIn) and not isinstance(content, nn.Module)
    assert not set(foreign_weights.STAND_INS) & set(torch.serialization.get_safe_globals())  # none stays allowed


# Files of other programs


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model_state_dict": state, "epoch": 3, "optimizer_state_dict": {"state": {}}},
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": state, "metrics": {"loss": torch.ones(1)}},
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
        lambda state: {"net": {f"module.net.{key}": value for key, value in state.items()}},
    ],
)
def test_weights_of_other_training_programs_are_found(filled_net, tmp_path, wrap):
    torch.save(wrap(filled_net.state_dict()), tmp_path / "a.pt")
    again, _ = checkpoint.load_model(tmp_path / "a.pt")
    assert torch.equal(again.fpn.P3_1.weight, filled_net.fpn.P3_1.weight)


def test_two_sets_of_weights_are_an_error_that_names_them(filled_net, tmp_path):
    torch.save({"net": filled_net.state_dict(), "ema": filled_net.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: holds something other than the weights of a model: \['net', 'ema'\]"):
        checkpoint.load_model(tmp_path / "a.pt")
