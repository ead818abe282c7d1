import math

import pytest
import torch
from torch import nn

from retinanet import engine
from retinanet.optim import RECIPES, Schedule, make_optimizer
from retinanet.postprocess import Detections
from retinanet.utils import UserError

CPU = torch.device("cpu")


class Line(nn.Module):
    """Stands in for a network: its class loss is the squared distance of a weight from each image's mean."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs):
        images, _ = inputs
        error = (self.weight - images.mean(dim=(1, 2, 3))) ** 2
        return error.mean(dim=0, keepdim=True), 0 * self.weight


def batch(*values):
    images = torch.stack([torch.full((3, 2, 2), float(value)) for value in values])
    return {
        "img": images,
        "annot": torch.full((len(values), 1, 5), -1.0),
        "index": list(range(len(values))),
        "scale": [0.5] * len(values),
        "size": [(2, 2)] * len(values),
    }


def train(model, loader, recipe="original", lr=0.1, **settings):
    optimizer = make_optimizer(model, RECIPES[recipe], lr)
    schedule = Schedule(optimizer, RECIPES[recipe], 100)
    return engine.train_one_epoch(model, loader, optimizer, schedule, CPU, torch.float32, epoch=3, **settings)


def test_statistics_and_log_are_means_over_batches():
    entries, model = [], Line()
    stats = train(model, [batch(1, 1), batch(2), batch(3)], lr=1e-12, log_step=entries.append, log_every=2)
    assert stats["class_loss"] == pytest.approx((1 + 4 + 9) / 3) and stats["box_loss"] == 0
    assert [entry["step"] for entry in entries] == [2, 3]
    assert [entry["class_loss"] for entry in entries] == pytest.approx([2.5, 9])
    assert all(entry["epoch"] == 3 and entry["lr"] == pytest.approx(1e-12) for entry in entries)


def test_accumulated_batches_equal_one_large_batch():
    weights = []
    for loader, accumulate in (
        ([batch(1, 2, 3, 4)], 1),
        ([batch(1, 2), batch(3, 4)], 2),
        ([batch(1, 2), batch(3, 4)], 5),
    ):
        model = Line()
        train(model, loader, "paper", accumulate=accumulate)
        weights.append(model.weight.item())
    assert weights[1:] == pytest.approx([weights[0]] * 2) and weights[0] != 0


def test_clipping_bounds_the_step():
    free, clipped = Line(), Line()
    train(free, [batch(100)], "paper")
    train(clipped, [batch(100)], "paper", clip_norm=1.0)
    assert clipped.weight.item() == pytest.approx(free.weight.item() / 200, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    model = Line()
    with pytest.raises(UserError, match=r"epoch 3, step 1, images \[0, 1\]"):
        train(model, [batch(0), batch(1, math.nan)])
    assert model.weight.item() == 0


def test_after_step_is_called_once_an_optimizer_step():
    calls = []
    train(Line(), [batch(1)] * 5, accumulate=2, after_step=lambda: calls.append(1))
    assert len(calls) == 3


class Finder(nn.Module):
    """Finds one box an image, with the image's mean as its score."""

    def detect(self, images, image_sizes, fail=False):
        assert not self.training
        if fail:
            raise RuntimeError("broken")
        means = images.mean(dim=(1, 2, 3))
        return [
            Detections(mean[None], torch.tensor([0]), torch.tensor([[0.0, 0.0, *reversed(size)]]))
            for mean, size in zip(means, image_sizes, strict=True)
        ]


@pytest.mark.parametrize("training", [True, False])
def test_detect_gives_original_pixels_and_leaves_the_mode(training):
    model = Finder().train(training)
    found = engine.detect(model, [batch(1, 2)], CPU)
    assert sorted(found) == [0, 1]
    assert found[1].scores.item() == 2 and found[1].boxes.tolist() == [[0, 0, 4, 4]]
    assert model.training == training
    with pytest.raises(RuntimeError, match="broken"):
        engine.detect(model, [batch(1)], CPU, fail=True)
    assert model.training == training
