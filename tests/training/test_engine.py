"""The loop, and what it counts and checks (engine, accounting, finite)."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from retinanet.errors import UserError
from retinanet.model import resnet18
from retinanet.training.accounting import Progress
from retinanet.training.engine import train_one_epoch
from retinanet.training.finite import NotFiniteError
from retinanet.training.recipes import RECIPES, Schedule, make_optimizer

CPU = torch.device("cpu")


class Line(nn.Module):
    """Replaces a network: its class loss is the squared distance of a weight from each image's mean."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs):
        images, _ = inputs
        error = (self.weight - images.mean(dim=(1, 2, 3))) ** 2
        return error.mean(dim=0, keepdim=True), 0 * self.weight


def batch(*values):
    images = torch.stack([torch.full((3, 2, 2), float(value)) for value in values])
    return {"img": images, "annot": torch.full((len(values), 1, 5), -1.0), "index": list(range(len(values)))}


def trainer(model, recipe="original", lr=0.1, scaled=False):
    """A function that trains `model` for an epoch, and what it counts."""
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    optimizer = make_optimizer(model, RECIPES[recipe], lr)
    schedule, progress = Schedule(optimizer, RECIPES[recipe], 100), Progress(epoch=3)

    def train(loader, **options):
        return train_one_epoch(model, loader, optimizer, scaler, schedule, CPU, torch.float32, progress, **options)

    return train, progress


def train(model, loader, recipe="original", lr=0.1, scaled=False, **options):
    return trainer(model, recipe, lr, scaled)[0](loader, **options)


def test_statistics_and_log_are_means_over_batches():
    entries = []
    loader = [batch(1, 1), batch(2), batch(3)]
    statistics = train(Line(), loader, lr=1e-12, log_step=entries.append, log_every=2)
    assert statistics["class_loss"] == pytest.approx((1 + 4 + 9) / 3) and statistics["box_loss"] == 0
    assert [entry["step"] for entry in entries] == [2, 3]
    assert [entry["class_loss"] for entry in entries] == pytest.approx([2.5, 9])
    assert [entry["grad_norm"] for entry in entries] == pytest.approx([4, 6])  # twice the distance
    assert all(entry["epoch"] == 3 and entry["lr"] == pytest.approx(1e-12) for entry in entries)


def test_accumulated_batches_equal_one_large_batch():
    weights = []
    halves = [batch(1, 2), batch(3, 4)]
    for loader, accumulate in (([batch(1, 2, 3, 4)], 1), (halves, 2), (halves, 5)):
        model = Line()
        train(model, loader, "paper", accumulate=accumulate)
        weights.append(model.weight.item())
    assert weights[1:] == pytest.approx([weights[0]] * 2) and weights[0] != 0


class Doubles(TorchDispatchMode):
    """Collects the shapes of results in float64, which Apple's GPUs do not compute."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.shapes.add(tuple(result.shape))
        return result


def test_nothing_is_float64_but_the_sums_of_the_losses():
    one = batch(*range(2))
    one |= {"img": torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "annot": torch.tensor([[[8.0, 8, 60, 60, 1]]] * 2)}
    model = resnet18(3)
    with Doubles() as found:
        train(model, [one] * 2, "paper", lr=1e-3, accumulate=2, clip_norm=1.0)
    assert found.shapes == {(1, 2, 2), (2,)}  # [ranks, batches, losses] on the host, and their mean


def test_clipping_bounds_the_step():
    free, clipped = Line(), Line()
    train(free, [batch(100)], "paper")
    train(clipped, [batch(100)], "paper", clip_norm=1.0)
    assert clipped.weight.item() == pytest.approx(free.weight.item() / 200, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    model = Line()
    with pytest.raises(NotFiniteError, match=r"class nan, box 0.* epoch 3, step 2, images 0, 1"):
        train(model, [batch(0), batch(1, math.nan)])
    assert model.weight.item() == 0


def test_the_batches_that_are_not_finite_are_in_the_error():
    with pytest.raises(NotFiniteError) as caught:
        train(Line(), [batch(1), batch(math.inf)], accumulate=2)
    assert [found["img"][0, 0, 0, 0].item() for found in caught.value.batches] == [math.inf]


def test_a_gradient_that_is_not_finite_is_reported_a_step_later_at_the_latest():
    class Steep(Line):
        def forward(self, inputs):
            losses = super().forward(inputs)
            losses[0].register_hook(lambda gradient: gradient * math.inf)
            return losses

    for loader in ([batch(1)], [batch(1), batch(2)]):
        with pytest.raises(NotFiniteError, match=r"gradient's norm is not finite .* step 1, images 0") as caught:
            train(Steep(), loader)
        assert [found["index"] for found in caught.value.batches] == [[0]]


class Overflowing(Line):
    """Its gradient is infinite above `largest`, as in float16."""

    largest = 65504.0

    def forward(self, inputs):
        losses = super().forward(inputs)
        losses[0].register_hook(lambda slope: torch.where(slope > self.largest, math.inf, slope))
        return losses


@pytest.mark.parametrize("recipe", ["original", "paper", "scratch"])
def test_a_step_whose_gradient_overflows_is_skipped_and_the_scale_halved(recipe):
    entries, weights = [], []
    model = Overflowing()

    def after_step(_, check_norm):
        check_norm()  # is no error
        weights.append(model.weight.item())

    loader = [batch(1), batch(2), batch(3)]
    train(
        model, loader, recipe, scaled=True, clip_norm=1.0, log_step=entries.append, log_every=1, after_step=after_step
    )
    assert [entry["loss_scale"] for entry in entries] == [65536, 32768, 32768]
    assert "grad_norm" not in entries[0] and entries[1]["grad_norm"] == pytest.approx(4)  # before clipping, unscaled
    assert weights[0] == 0 < weights[1] < weights[2]


def test_the_scale_changes_no_number_of_a_step():
    plain, scaled = Line(), Line()
    loader = [batch(1, 2), batch(3), batch(4, 5)]
    for model in (plain, scaled):
        train(model, loader, "paper", lr=0.01, accumulate=2, clip_norm=3.0, scaled=model is scaled)
    assert plain.weight.item() == scaled.weight.item() != 0


def test_a_gradient_that_overflows_without_a_scale_is_an_error():
    model = Overflowing()
    model.largest = 1e-9
    with pytest.raises(NotFiniteError, match=r"gradient's norm is not finite .* epoch 3, step 17, images 0"):
        train(model, [batch(1)] * 20, scaled=True)  # the scale was 2 ** 16, and is 1 in step 17
    assert model.weight.item() == 0


def test_an_epoch_continues_from_its_middle():
    whole, first, second = [], [], []
    batches = [batch(value) for value in range(1, 8)]
    expected = train(Line(), batches, log_step=whole.append, log_every=2)

    class StopError(Exception):
        pass

    def stop_after_step_3(*_):
        if progress.step == 3:
            raise StopError

    run, progress = trainer(Line())
    with pytest.raises(StopError):
        run(batches, log_step=first.append, log_every=2, after_step=stop_after_step_3)

    class Rest(list):
        def __iter__(self):
            return iter(batches[3:])

    found = run(Rest(batches), log_step=second.append, log_every=2)
    assert run(Rest(batches))["loss"] == expected["loss"]  # a complete epoch takes no step
    for entry in (expected, found, *whole, *first, *second):
        entry.pop("images_per_second")
    assert found == expected and first + second == whole


class Normed(Line):
    """Normalises the means of the images, [B, 3, 1, 1]: one image has one value a channel."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, inputs):
        return super().forward([self.norm(inputs[0].mean(dim=(2, 3), keepdim=True)), None])


def test_a_batch_of_one_small_image_takes_the_running_statistics():
    model = Normed()
    loader = [{key: value for key, value in batch(*values).items()} for values in ((1, 3), (9,), (1, 3))]
    for one in loader:
        one["img"] = one["img"].repeat(1, 1, 16, 16)  # 32 x 32 pixels
    train(model, loader)
    assert model.norm.num_batches_tracked == 2 and model.norm.training
    train(model, loader[1:2])
    assert model.norm.num_batches_tracked == 2


def test_frozen_batchnorm_keeps_its_statistics():
    model = Normed()
    model.norm.requires_grad_(False)
    train(model, [batch(*range(8))])
    assert model.norm.num_batches_tracked == 0


def test_a_signal_is_asked_for_before_a_step_and_handed_on_after_it():
    answers, received = iter([0, 0, 15]), []
    train(
        Line(),
        [batch(1)] * 5,
        accumulate=2,
        stop_signal=lambda: next(answers),
        after_step=lambda signum, _: received.append(signum),
    )
    assert received == [0, 0, 15]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), UserError, "out of memory with 2 images of 2 x 2 pixels"),
        (RuntimeError("bug"), RuntimeError, "^bug$"),
    ],
)
def test_memory_that_runs_out_is_explained_and_other_errors_pass(error, kind, message):
    class Broken(Line):
        def forward(self, inputs):
            raise error

    with pytest.raises(kind, match=message):
        train(Broken(), [batch(1, 2)])
