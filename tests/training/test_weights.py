"""The weights that `--weights` names, and class heads matched by class name."""

import copy

import pytest
import torch
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights, retinanet_resnet50_fpn

import train
from retinanet.anchors import Anchors
from retinanet.data.shapes import CLASS_NAMES, ShapesDataset
from retinanet.errors import UserError
from retinanet.model import resnet, resnet18
from retinanet.training import checkpoint, weights

KEYS = ("classificationModel.output.weight", "classificationModel.output.bias")
COCO = RetinaNet_ResNet50_FPN_Weights.COCO_V1


def save_net(net, names, path):
    checkpoint.save(path, checkpoint.model_entries(net, names, 64, 96))
    return path


def logits_of(net):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return net.eval().heads(torch.randn(1, 3, 64, 96, generator=generator))[0]  # [1, A, K]


# Files


def test_weights_of_as_many_classes_are_taken_whole(filled_net, tmp_path):
    torch.save(filled_net.state_dict(), tmp_path / "a.pt")
    net = resnet18(3)
    assert weights.load_weights(net, tmp_path / "a.pt").endswith("a.pt: a state dict, ResNet-18, 3 classes")
    for key, value in filled_net.state_dict().items():
        assert torch.equal(net.state_dict()[key], value), key


def test_with_other_classes_only_the_last_layer_keeps_initial_weights(filled_net, tmp_path):
    torch.save(filled_net.state_dict(), tmp_path / "a.pt")
    net = resnet18(5)
    before = copy.deepcopy(net.state_dict())
    message = weights.load_weights(net, tmp_path / "a.pt")
    assert "3 classes; this model has 5, so the last layer of its class head keeps initial weights" in message
    for key, value in net.state_dict().items():
        fresh = key in ("classificationModel.output.weight", "classificationModel.output.bias")
        assert torch.equal(value, before[key] if fresh else filled_net.state_dict()[key]), key


def test_weights_bring_their_anchors(filled_net, tmp_path):
    path = save_net(filled_net, CLASS_NAMES, tmp_path / "a.pt")
    other = resnet18(3, anchors=Anchors(ratios=[1.0, 2.0, 3.0]))
    assert "so the box head must be retrained" in weights.load_weights(other, path)
    assert other.anchors.settings()["ratios"] == [1.0, 2.0, 3.0]
    assert torch.equal(logits_of(other)[..., :2], logits_of(filled_net)[..., :2])


def test_with_another_number_of_anchors_both_last_layers_keep_initial_weights(filled_net, tmp_path):
    path = save_net(filled_net, CLASS_NAMES, tmp_path / "a.pt")
    net = resnet18(3, anchors=Anchors(ratios=[1.0, 2.0], scales=[1.0]))
    message = weights.load_weights(net, path, CLASS_NAMES)
    assert message.endswith(
        "9 anchors per location, but this model has 2 (the flags --anchor_...), so the last "
        "layers of both heads keep initial weights"
    )
    assert torch.allclose(logits_of(net).sigmoid(), torch.tensor(0.01))
    assert torch.equal(net.classificationModel.conv4.weight, filled_net.classificationModel.conv4.weight)


def test_default_anchors_give_way(filled_net, tmp_path):
    anchors = Anchors(sizes=[16, 32, 64, 128, 256])
    source = resnet18(3, anchors=anchors)
    save_net(source, ["a", "b", "c"], tmp_path / "a.pt")
    net = resnet18(3)
    assert "its anchors are taken over" in weights.load_weights(net, tmp_path / "a.pt")
    assert net.anchors.settings() == anchors.settings()


def test_another_depth_is_an_error_that_names_both(filled_net, tmp_path):
    torch.save(filled_net.state_dict(), tmp_path / "a.pt")
    with torch.device("meta"):
        net = resnet(34, 3)
    with pytest.raises(UserError, match=r"a\.pt: holds a ResNet-18, but the model is a ResNet-34 \(--depth\)"):
        weights.load_weights(net, tmp_path / "a.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: holds no known ResNet, but"):
        weights.load_weights(net, tmp_path / "a.pt")


# Class heads by name


def test_classes_are_taken_by_name_at_all_anchors_and_new_ones_start_at_the_prior(filled_net, tmp_path):
    path = save_net(filled_net, CLASS_NAMES, tmp_path / "a.pt")
    names = ["triangle", "star", "circle", "rectangle"]
    net = resnet18(4)
    message = weights.load_weights(net, path, names)
    assert message.endswith("class head by name: 3 of 4 classes are taken over, triangle, circle, rectangle; new: star")
    found, before = logits_of(net), logits_of(filled_net)
    torch.testing.assert_close(found[..., [2, 3, 0]], before, rtol=0, atol=1e-4)
    assert before.std(dim=1).min() > 0.1 and torch.allclose(found[..., 1].sigmoid(), torch.tensor(0.01))


def test_the_same_classes_are_taken_whole_and_others_not_at_all(filled_net, tmp_path):
    path = save_net(filled_net, CLASS_NAMES, tmp_path / "a.pt")
    net, other = resnet18(3), resnet18(3)
    assert weights.load_weights(net, path, CLASS_NAMES).endswith("3 classes, the same")
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in filled_net.state_dict().items())
    fresh = {key: other.state_dict()[key].clone() for key in KEYS}
    message = weights.load_weights(other, path, ["a", "b", "c"])
    assert "none of them is one of this model's, so the last layer of its class head keeps initial weights" in message
    assert all(torch.equal(fresh[key], other.state_dict()[key]) for key in KEYS)


def test_weights_without_names_are_taken_in_their_order(filled_net, tmp_path):
    torch.save(filled_net.state_dict(), tmp_path / "a.pt")
    net = resnet18(3)
    message = weights.load_weights(net, tmp_path / "a.pt", ["a", "b", "c"])
    assert message.endswith("without names, which are taken over in their order")
    assert torch.equal(logits_of(net), logits_of(filled_net))


@pytest.mark.parametrize(
    ("theirs", "ours", "found"),
    [
        (["traffic light", "cat"], ["Cat", "traffic_light ", "dog"], {0: 1, 1: 0}),
        (["cat", "Cat"], ["Cat", "CAT"], {0: 1}),
        (["cat"], ["cat", "Cat"], {0: 0}),
        (["cats"], ["cat"], {}),
        (["caf\u00e9", "cat"], ["Cafe\u0301", "dog"], {0: 0}),
    ],
)
def test_names_match_without_case_and_separators_if_unique(theirs, ours, found):
    assert weights.match_names(theirs, ours) == found


def test_messages_are_bounded(filled_net, tmp_path):
    names = [f"class number {label}" for label in range(1000)]
    path = save_net(filled_net, CLASS_NAMES, tmp_path / "a.pt")
    message = weights.load_weights(resnet18(1003), path, [*names, *CLASS_NAMES])
    assert "class number 9 and 990 more" in message and len(message) < 600


def test_a_model_follows_the_order_of_a_data_set(filled_net, caplog):
    dataset = ShapesDataset(1)
    info = {"class_names": ["triangle", "circle", "rectangle"], "min_side": 64}
    net, new = weights.match_classes("best.pt", filled_net, info, dataset)
    assert new == {"class_names": list(CLASS_NAMES), "min_side": 64} and info["class_names"][0] == "triangle"
    assert torch.equal(logits_of(net), logits_of(filled_net)[..., [1, 2, 0]])
    same = {"class_names": list(CLASS_NAMES)}
    assert weights.match_classes("best.pt", filled_net, same, dataset) == (filled_net, same)
    with pytest.raises(UserError, match=r"best\.pt lacks 'rectangle'"):
        weights.match_classes("best.pt", filled_net, {"class_names": ["triangle", "circle", "star"]}, dataset)


# Names


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch hub without a network; the folder of its checkpoints."""

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return tmp_path / "home" / "hub" / "checkpoints"


def test_coco_is_torchvisions_retinanet_by_name(hub):
    torch.manual_seed(0)
    state = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).state_dict()
    logits = "head.classification_head.cls_logits"
    state[f"{logits}.bias"] = torch.arange(9 * 91.0)
    hub.mkdir(parents=True)
    torch.save(state, hub / "retinanet_resnet50_fpn_coco-eeacb38b.pth")
    net = weights.make_model(50, "coco", ["Dog", "star", "person"], Anchors())
    bias = net.state_dict()[KEYS[1]].reshape(9, 3)
    dog, person = (COCO.meta["categories"].index(name) for name in ("dog", "person"))
    assert torch.equal(bias[:, [0, 2]], torch.arange(9)[:, None] * 91.0 + torch.tensor([dog, person]))
    assert torch.allclose(bias[:, 1].sigmoid(), torch.tensor(0.01))
    weight = state[f"{logits}.weight"].reshape(9, 91, -1)[:, [dog, person]]
    assert torch.equal(net.state_dict()[KEYS[0]].reshape(9, 3, -1)[:, [0, 2]], weight)
    assert torch.equal(net.fpn.P3_1.weight, state["backbone.fpn.inner_blocks.0.0.weight"])


def test_without_a_network_the_message_says_which_file_goes_where(hub):
    with pytest.raises(UserError) as caught:
        weights.make_model(50, "coco", ["dog"], Anchors())
    assert str(caught.value).endswith(f"(no network). Put {COCO.url} into {hub}")


def test_an_unknown_name_is_an_error(hub):
    with pytest.raises(UserError, match=r"neither a file nor one of .*; did you mean 'imagenet'"):
        weights.make_model(18, "imagnet", ["dog"], Anchors())
    with pytest.raises(UserError, match="GroupNorm"):
        weights.make_model(50, "coco_v2", ["dog"], Anchors())
    with pytest.raises(UserError, match=r"runs_v2/best\.pt: neither a file nor one of [a-z_2, ]*$"):
        weights.make_model(50, "runs_v2/best.pt", ["dog"], Anchors())


def test_coco_needs_its_depth(capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--dataset", "shapes", "--weights", "coco", "--depth", "18"])
    assert "--weights coco is a ResNet-50, not --depth 18" in capsys.readouterr().err
