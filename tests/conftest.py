"""Fixtures for several test modules: the original's numbers, weights for two implementations, and small networks."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(1)  # sums in a fixed order, and processes that can be forked


def load_golden(name):
    """The arrays of tests/golden/<name>.npz as tensors; scalars as numbers."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(array) if array.shape else array.item() for key, array in arrays.items()}


def fill_weights(module, seed, logit_scale, delta_scale):
    """Overwrite a RetinaNet's weights from NumPy's generator, key by key in sorted order.

    golden/forward.npz was computed by the original with weights made in this way.
    """
    generator = np.random.default_rng(seed)
    state = module.state_dict()
    for key in sorted(state):
        if key.endswith("num_batches_tracked"):
            continue
        shape = tuple(state[key].shape)
        x = generator.standard_normal(shape).astype(np.float32)
        if key.endswith("running_var"):
            x = 1 + 0.1 * np.abs(x)
        elif key.endswith("running_mean"):
            x = 0.1 * x
        elif len(shape) == 4:
            x = x * np.float32(np.sqrt(2.0 / np.prod(shape[1:])))
        elif "bn" in key or "downsample.1" in key:
            x = 1 + 0.1 * x if key.endswith("weight") else 0.1 * x
        else:
            x = 0.1 * x
        if key == "classificationModel.output.weight":
            x = x * np.float32(logit_scale)
        elif key == "classificationModel.output.bias":
            x = x - np.float32(4.0)
        elif key == "regressionModel.output.weight":
            x = x * np.float32(delta_scale)
        state[key] = torch.from_numpy(np.ascontiguousarray(x))
    module.load_state_dict(state)
    return module


@pytest.fixture(scope="session")
def filled_net():
    """A ResNet-18 RetinaNet of 3 classes with lively outputs, in evaluation mode. Do not change it."""
    from retinanet.model import resnet18

    return fill_weights(resnet18(3), seed=1, logit_scale=0.015, delta_scale=0.008).eval()


@pytest.fixture(scope="module")
def small_network(filled_net):  # created first, because it must not be small
    """Detectors of the module on a ResNet-18 have half its blocks, and 16 channels in pyramid and heads: 20 MB."""
    from retinanet import model

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.ARCHITECTURES, 18, (model.BasicBlock, (1, 1, 1, 1)))
        patch.setattr(model, "PyramidFeatures", functools.partial(model.PyramidFeatures, feature_size=16))
        for name in ("RegressionModel", "ClassificationModel"):
            head = getattr(model, name)
            patch.setattr(model, name, lambda _, *sizes, head=head: head(16, *sizes, feature_size=16))
        yield


@pytest.fixture(scope="module")
def small_training(small_network):
    """Trainings of the module use a small network, and draw neither images nor the report."""
    from retinanet import running

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.charts, "draw_training_curves", lambda *_: None)
        patch.setattr(running.views, "save_detections", lambda *_: None)
        patch.setattr(running.views, "save_data_images", lambda *_: None)
        patch.setattr(running, "write_page", lambda *_: None)
        yield


@pytest.fixture
def no_pictures(monkeypatch):
    """Scores are written without charts and report.html, which take longer than the scores."""
    from retinanet import api

    for module, name in ((api.charts, "draw_curves"), (api.charts, "draw_thresholds"), (api, "write_page")):
        monkeypatch.setattr(module, name, lambda *_, **__: None)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random seed."""
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Tests that fork run first: a child's backward pass dies if other tests (the exporters) have started threads."""
    items.sort(key=lambda item: item.path.name != "test_train.py")
