import pytest
import torch
from torch import nn

import retinanet
from retinanet.anchors import Anchors
from retinanet.data.shapes import ShapesDataset
from retinanet.data.transforms import Resizer
from retinanet.training.recipes import EMA, RECIPES, Schedule, make_optimizer
from retinanet.training.weights import make_model


def rates(name, total_steps, lr=1.0):
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, RECIPES[name], lr)
    schedule = Schedule(optimizer, RECIPES[name], total_steps)
    found = []
    for _ in range(total_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_paper_steps_down_at_two_thirds_and_eight_ninths_after_a_warm_up():
    found = rates("paper", 9000)
    assert found[0] == pytest.approx(1 / 3) and found[250] == pytest.approx(2 / 3) and found[500] == 1
    assert found[5999] == 1 and found[6000] == pytest.approx(0.1)
    assert found[7999] == pytest.approx(0.1) and found[8000] == pytest.approx(0.01)


def test_one_cycle_rises_to_the_peak_and_ends_near_zero():
    found = rates("scratch", 100)
    assert max(found) == pytest.approx(1, rel=1e-2) and found[0] < 0.1 and found[-1] < 1e-2


def test_plateau_falls_when_the_training_loss_does_not():
    optimizer = make_optimizer(nn.Linear(2, 2), RECIPES["original"], 1.0)
    schedule = Schedule(optimizer, RECIPES["original"], 10)
    for _ in range(5):
        schedule.end_epoch(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_paper_trains_biases_at_twice_the_rate_without_decay():
    weights, biases = make_optimizer(nn.Linear(2, 2), RECIPES["paper"], 0.01).param_groups
    assert (weights["lr"], weights["weight_decay"]) == (0.01, 1e-4)
    assert (biases["lr"], biases["weight_decay"]) == (0.02, 0.0)


def test_modern_decays_neither_biases_nor_norms_and_trains_all_at_one_rate():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    (weights, vectors) = make_optimizer(model, RECIPES["modern"], 1e-4).param_groups
    assert (weights["lr"], weights["weight_decay"], len(weights["params"])) == (1e-4, 0.05, 1)
    assert (vectors["lr"], vectors["weight_decay"], len(vectors["params"])) == (1e-4, 0.0, 3)


class Parts(nn.Module):
    """Two weights of a backbone and two of a head, with the names that they have in the detector."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize("recipe", ["paper", "original"])
def test_the_backbone_has_a_rate_of_its_own(recipe):
    model = Parts()
    named = {weight: name for name, weight in model.named_parameters()}
    groups = make_optimizer(model, RECIPES[recipe], 0.01, backbone_lr=0.5).param_groups
    found = [([named[weight] for weight in group["params"]], group["lr"], group["weight_decay"]) for group in groups]
    if recipe == "paper":
        assert found == [
            (["head.weight"], 0.01, 1e-4), (["head.bias"], 0.02, 0),
            (["layer1.weight"], 0.005, 1e-4), (["layer1.bias"], 0.01, 0),
        ]  # fmt: skip
    else:
        assert found == [(["head.weight", "head.bias"], 0.01, 0), (["layer1.weight", "layer1.bias"], 0.005, 0)]


def test_frozen_weights_are_left_out():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = make_optimizer(model, RECIPES["original"], 1.0).param_groups
    assert [weight is model.weight for weight in group["params"]] == [True]


def test_a_schedule_continues_from_a_saved_state():
    first = make_optimizer(nn.Linear(2, 2), RECIPES["scratch"], 1.0)
    schedule = Schedule(first, RECIPES["scratch"], 20)
    for _ in range(7):
        first.step()
        schedule.step()
    second = make_optimizer(nn.Linear(2, 2), RECIPES["scratch"], 1.0)
    again = Schedule(second, RECIPES["scratch"], 20)
    again.scheduler.load_state_dict(schedule.scheduler.state_dict())
    second.load_state_dict(first.state_dict())
    for optimizer, chosen in ((first, schedule), (second, again)):
        optimizer.step()
        chosen.step()
    assert first.param_groups[0]["lr"] == second.param_groups[0]["lr"]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_take_a_step(name):
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    model(torch.ones(1, 2)).sum().backward()
    make_optimizer(model, RECIPES[name], RECIPES[name].lr).step()
    assert not torch.equal(model.weight, before)


def test_ema_by_hand():
    model = nn.BatchNorm1d(1)
    ema = EMA(model, 0.5)
    for value in (1.0, 3.0):
        nn.init.constant_(model.weight, value)
        model.running_mean.fill_(value)
        ema.update(model)
    # The weight starts at 1; the decay is 2/11, then 3/12, and would stay at 0.5 in the end.
    assert ema.model.weight.item() == pytest.approx(0.25 * 1 + 0.75 * 3)
    assert ema.model.running_mean.item() == 3 and not ema.model.training
    assert not any(weight.requires_grad for weight in ema.model.parameters()) and ema.steps == 2


def test_ema_reaches_its_decay():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, 0.9)
    for _ in range(1000):
        ema.update(model)
    nn.init.ones_(model.weight)
    ema.update(model)
    assert ema.model.weight.item() == pytest.approx(0.1)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_states_are_plain_types(name, tmp_path):
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, RECIPES[name], 1.0)
    schedule = Schedule(optimizer, RECIPES[name], 20)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedule.step()
    schedule.end_epoch(1.0)
    torch.save([optimizer.state_dict(), schedule.scheduler.state_dict()], tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)


# Whole trainings: minutes


class FourShapes(ShapesDataset):
    """The shapes with their classes in another order, and one more that has no boxes."""

    names = ("triangle", "star", "circle", "rectangle")

    def __init__(self, num_images, seed):
        super().__init__(num_images, seed)
        self.annotations[:, 4] = [self.names.index(self.labels[label]) for label in self.annotations[:, 4].astype(int)]
        self.labels = dict(enumerate(self.names))
        self.classes = {name: label for label, name in self.labels.items()}
        self.coco_labels = {label: label for label in self.labels}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run of recipe scratch, and its data sets."""
    sets, out_dir = (ShapesDataset(400, seed=1), ShapesDataset(100, seed=0)), tmp_path_factory.mktemp("learned")
    settings = {"depth": 18, "batch_size": 4, "min_side": 96, "workers": 0, "val_every": 4}
    return retinanet.train(*sets, recipe="scratch", epochs=4, out_dir=out_dir, **settings), sets, settings


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_trains_the_shapes_from_a_checkpoint_of_scratch(learned, tmp_path, recipe):
    start, (_, val_set), settings = learned
    others = ShapesDataset(100, seed=3)
    result = retinanet.train(others, val_set, recipe=recipe, weights=start.last, epochs=4, out_dir=tmp_path, **settings)
    assert result.last_metrics["AP50"] >= 0.95


@pytest.mark.slow
def test_fine_tuning_on_more_classes_in_another_order_starts_where_the_checkpoint_ended(learned):
    result, (_, val_set), _ = learned
    net = make_model(18, str(result.last), FourShapes.names, Anchors())
    more = FourShapes(100, seed=0)
    more.transform = Resizer(96)
    found = retinanet.validate(net, more, workers=0)
    before = retinanet.validate(result.last, val_set, workers=0)
    assert before["AP"] > 0.5 and found["AP"] >= 0.9 * before["AP"]
    assert [row["AP"] for row in found["classes"]][1] == -1
