"""Every public name of the original's modules is there, and takes the original's arguments."""

import importlib
import inspect

import pytest
import torch

from retinanet import losses, model
from retinanet.anchors import Anchors

# Module -> name -> the original's parameters, in order; of a class, those of its constructor.
NAMES = {
    "model": {
        "PyramidFeatures": "C3_size C4_size C5_size feature_size",
        "RegressionModel": "num_features_in num_anchors feature_size",
        "ClassificationModel": "num_features_in num_anchors num_classes prior feature_size",
        "ResNet": "num_classes block layers",
        **{f"resnet{depth}": "num_classes pretrained" for depth in (18, 34, 50, 101, 152)},
        "model_urls": None,
        "BasicBlock": "inplanes planes stride downsample",
        "Bottleneck": "inplanes planes stride downsample",
        "BBoxTransform": "mean std",
        "ClipBoxes": "width height",
        "Anchors": "pyramid_levels strides sizes ratios scales",
        "losses": None,
    },
    "anchors": {
        "Anchors": "pyramid_levels strides sizes ratios scales",
        "generate_anchors": "base_size ratios scales",
        "compute_shape": "image_shape pyramid_levels",
        "anchors_for_shape": "image_shape pyramid_levels ratios scales strides sizes shapes_callback",
        "shift": "shape stride anchors",
    },
    "losses": {"calc_iou": "a b", "FocalLoss": ""},
    "utils": {
        "conv3x3": "in_planes out_planes stride",
        "BasicBlock": "inplanes planes stride downsample",
        "Bottleneck": "inplanes planes stride downsample",
        "BBoxTransform": "mean std",
        "ClipBoxes": "width height",
    },
    "dataloader": {
        "CocoDataset": "root_dir set_name transform",
        "CSVDataset": "train_file class_list transform",
        "collater": "data",
        "Resizer": "",
        "Augmenter": "",
        "Normalizer": "",
        "UnNormalizer": "mean std",
        "AspectRatioBasedSampler": "data_source batch_size drop_last",
    },
    "coco_eval": {"evaluate_coco": "dataset model threshold"},
    "csv_eval": {
        "compute_overlap": "a b",
        "evaluate": "generator retinanet iou_threshold score_threshold max_detections save_path",
    },
}
DEFAULTS = {
    ("model", "ClassificationModel"): {"num_anchors": 9, "num_classes": 80, "prior": 0.01, "feature_size": 256},
    ("model", "RegressionModel"): {"num_anchors": 9, "feature_size": 256},
    ("anchors", "generate_anchors"): {"base_size": 16},
    ("dataloader", "CocoDataset"): {"set_name": "train2017"},
    ("coco_eval", "evaluate_coco"): {"threshold": 0.05},
    ("csv_eval", "evaluate"): {"iou_threshold": 0.5, "score_threshold": 0.05, "max_detections": 100},
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in NAMES for name in NAMES[module]])
def test_a_name_takes_the_originals_arguments(module, name):
    found = getattr(importlib.import_module(f"retinanet.{module}"), name)
    if NAMES[module][name] is None:
        return
    wanted = NAMES[module][name].split()
    parameters = inspect.signature(found).parameters
    assert list(parameters)[: len(wanted)] == wanted
    assert all(parameter.default is not parameter.empty for parameter in list(parameters.values())[len(wanted) :])
    for key, value in DEFAULTS.get((module, name), {}).items():
        assert parameters[key].default == value


def test_resnet_is_the_detector():
    net = model.ResNet(7, model.Bottleneck, [3, 4, 6, 3])
    assert isinstance(net.anchors, Anchors) and isinstance(net.focalLoss, losses.FocalLoss)
    assert net.classificationModel.output.out_channels == 9 * 7
    assert net.state_dict().keys() == model.resnet50(num_classes=7).state_dict().keys()


def test_calls_by_the_originals_names():
    levels = model.PyramidFeatures(8, 16, 32, feature_size=4)(
        [torch.zeros(1, 8, 8, 8), torch.zeros(1, 16, 4, 4), torch.zeros(1, 32, 2, 2)]
    )
    assert [level.shape[-1] for level in levels] == [8, 4, 2, 1, 1]
    assert model.ClassificationModel(4, num_anchors=2, num_classes=3, prior=0.1)(levels[0]).shape == (1, 8 * 8 * 2, 3)
    assert model.RegressionModel(4, num_anchors=2)(levels[0]).shape == (1, 8 * 8 * 2, 4)
    assert set(model.model_urls) == {"resnet18", "resnet34", "resnet50", "resnet101", "resnet152"}
