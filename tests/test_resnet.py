import copy

import pytest
import torch
import torchvision
from torch import nn

from retinanet.model import ARCHITECTURES
from retinanet.resnet import Backbone, conv_bn, half_resolution, imagenet_weights


def lively_bn(channels):
    bn = nn.BatchNorm2d(channels)
    for values in (bn.weight.data, bn.bias.data, bn.running_mean):
        values.normal_()
    bn.running_var.uniform_(0.5, 2)
    return bn


@pytest.mark.parametrize("training", [True, False])
def test_folded_normalisation_is_the_same_function_with_the_same_gradients(training):
    conv, bn = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), lively_bn(6).train(training)
    conv2, bn2 = copy.deepcopy(conv), copy.deepcopy(bn)
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    ours, plain = conv_bn(conv, bn, x), bn2(conv2(x2))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(plain)
    (ours * weights).sum().backward()
    (plain * weights).sum().backward()
    pairs = [(x, x2), (conv.weight, conv2.weight), (bn.weight, bn2.weight), (bn.bias, bn2.bias)]
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(bn.running_mean, bn2.running_mean)


@pytest.mark.parametrize("depth", [18, 50])
def test_backbone_equals_torchvisions(depth):
    theirs = getattr(torchvision.models, f"resnet{depth}")().eval()
    ours = Backbone(*ARCHITECTURES[depth]).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing and set(unexpected) == {"fc.weight", "fc.bias"}
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        c3, c4, c5 = ours.backbone(images)
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
        expected = theirs.layer2(theirs.layer1(x))
        torch.testing.assert_close(c3, expected, rtol=1e-3, atol=1e-4)
        expected = theirs.layer3(expected)
        torch.testing.assert_close(c4, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(c5, theirs.layer4(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("depth", "version"), [(18, "IMAGENET1K_V1"), (50, "IMAGENET1K_V2")])
def test_imagenet_weights_are_read_from_torch_hubs_folder(depth, version, tmp_path, monkeypatch):
    weights = torchvision.models.get_weight(f"ResNet{depth}_Weights.{version}")
    (tmp_path / "checkpoints").mkdir()
    state = torchvision.models.get_model(f"resnet{depth}").state_dict()
    torch.save(state, tmp_path / "checkpoints" / weights.url.rpartition("/")[2])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    loaded = imagenet_weights(depth, version)
    assert set(loaded) == {key for key in state if not key.startswith("fc.")}
    torch.testing.assert_close(loaded["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])


def test_unknown_imagenet_weights_are_named():
    with pytest.raises(ValueError, match=r"no weights IMAGENET1K_V2 for ResNet-34; available: IMAGENET1K_V1$"):
        imagenet_weights(34, "IMAGENET1K_V2")


@pytest.mark.parametrize("content", [b"", b"<html>no such file</html>", b"PK\x03\x04" + bytes(99)])
def test_a_damaged_file_of_imagenet_weights_is_named(content, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "resnet50-0676ba61.pth"
    file.write_bytes(content)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(RuntimeError, match=f"^{file}: is damaged; remove it, or replace it with https://"):
        imagenet_weights(50)


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(RuntimeError, match="no network") as caught:
        imagenet_weights(50)
    for part in (str(tmp_path), "resnet50-", "--weights none", "pretrained=False"):
        assert part in str(caught.value)


@pytest.mark.parametrize("height", [1, 3, 8])
def test_the_bf16_gradient_on_a_map_one_column_wide_is_right(height):
    conv = nn.Conv2d(256, 256, 3, stride=2, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(2, 256, height, 1).to(memory_format=torch.channels_last)
    (expected,) = torch.autograd.grad(conv(x).sum(), conv.weight)
    for _ in range(3):
        garbage = [torch.full((size,), float("nan")) for size in (2**10, 2**14, 2**16, 9 * 256 * 256, 2**22)]
        del garbage  # memory that torch leaves uninitialised now holds NaN
        with torch.autocast("cpu", torch.bfloat16):
            y = half_resolution(conv, x)
        (grad,) = torch.autograd.grad(y.float().sum(), conv.weight)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_half_resolution_is_the_convolution(dtype):
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1).to(dtype)
    for width in (1, 2, 5):
        x = torch.randn(2, 4, 5, width, dtype=dtype)
        found = half_resolution(conv, x)
        assert found.dtype == dtype
        torch.testing.assert_close(found, conv(x), rtol=2e-2, atol=2e-2)
