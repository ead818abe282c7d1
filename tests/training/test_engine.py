import math

import pytest
import torch
from torch import nn

from retinanet import inference
from retinanet.errors import UserError
from retinanet.postprocess import Detections
from retinanet.training import engine
from retinanet.training.recipes import RECIPES, Schedule, make_optimizer

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
    return engine.train_one_epoch(
        model, loader, optimizer, schedule, CPU, torch.float32, engine.Progress(epoch=3), **settings
    )


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
    with pytest.raises(UserError, match=r"epoch 3, step 2, images 0, 1"):
        train(model, [batch(0), batch(1, math.nan)])
    assert model.weight.item() == 0


def test_a_gradient_that_is_not_finite_is_noticed_a_step_later_at_the_latest():
    class Steep(Line):
        def forward(self, inputs):
            losses = super().forward(inputs)
            losses[0].register_hook(lambda gradient: gradient * math.inf)
            return losses

    for loader in ([batch(1)], [batch(1), batch(2)]):
        with pytest.raises(engine.NotFiniteError, match=r"gradient's norm is not finite .* step 1, images 0") as caught:
            train(Steep(), loader)
        assert [found["index"] for found in caught.value.batches] == [[0]]


def test_the_batch_that_is_not_finite_is_handed_over():
    with pytest.raises(engine.NotFiniteError) as caught:
        train(Line(), [batch(1), batch(math.inf)], accumulate=2)
    assert [found["img"][0, 0, 0, 0].item() for found in caught.value.batches] == [math.inf]


def test_an_epoch_goes_on_from_its_middle():
    whole, first, second = [], [], []
    batches = [batch(value) for value in range(1, 8)]
    expected = train(Line(), batches, log_step=whole.append, log_every=2)

    class StopError(Exception):
        pass

    def stop_after_step_3(_):
        if progress.step == 3:
            raise StopError

    model, progress = Line(), engine.Progress(epoch=3)
    optimizer = make_optimizer(model, RECIPES["original"], 0.1)
    schedule = Schedule(optimizer, RECIPES["original"], 100)
    run = (optimizer, schedule, CPU, torch.float32, progress)
    with pytest.raises(StopError):
        engine.train_one_epoch(model, batches, *run, log_step=first.append, log_every=2, after_step=stop_after_step_3)

    class Rest(list):
        def __iter__(self):
            return iter(batches[3:])

    found = engine.train_one_epoch(model, Rest(batches), *run, log_step=second.append, log_every=2)
    for stats in (expected, found, *whole, *first, *second):
        stats.pop("images_per_second")
    assert found == expected and first + second == whole


def test_the_wish_is_asked_before_a_step_and_heard_after_it():
    answers, heard = iter([0, 0, 15]), []
    train(Line(), [batch(1)] * 3, wish=lambda: next(answers), after_step=heard.append)
    assert heard == [0, 0, 15]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_memory_that_runs_out_is_explained(error):
    class Greedy(Line):
        def forward(self, inputs):
            raise error

        def detect(self, images, image_sizes):
            raise error

    message = r"out of memory with 2 images of 2 x 2 pixels a batch in torch.float32: lower --batch_size"
    with pytest.raises(UserError, match=message):
        train(Greedy(), [batch(1, 2)])
    with pytest.raises(UserError, match=message):
        inference.detect(Greedy(), [batch(1, 2)], CPU)


def test_memory_that_runs_out_while_pictures_are_read_is_explained():
    def loader():
        yield batch(1)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(UserError, match=r"out of memory while pictures were read: lower --workers"):
        inference.detect(Finder(), loader(), CPU)


def test_other_errors_pass():
    class Broken(Line):
        def forward(self, inputs):
            raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match=r"^bug$"):
        train(Broken(), [batch(1)])


def test_after_step_is_called_once_an_optimizer_step():
    calls = []
    train(Line(), [batch(1)] * 5, accumulate=2, after_step=calls.append)
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
    found = inference.detect(model, [batch(1, 2)], CPU)
    assert sorted(found) == [0, 1]
    assert found[1].scores.item() == 2 and found[1].boxes.tolist() == [[0, 0, 4, 4]]
    assert model.training == training
    with pytest.raises(RuntimeError, match="broken"):
        inference.detect(model, [batch(1)], CPU, fail=True)
    assert model.training == training


def test_detection_leaves_off_when_told_to():
    answers = iter([False, False, True])
    batches = [{**batch(1), "index": [index]} for index in range(5)]
    assert sorted(inference.detect(Finder(), batches, CPU, stop=lambda: next(answers))) == [0, 1]
