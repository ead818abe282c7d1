import numpy as np
import pytest
import torch
from PIL import Image

from retinanet.losses import FocalLoss, focal_loss
from retinanet.matcher import BACKGROUND, IGNORE

pytest.importorskip("matplotlib")
from retinanet.visual import heatmaps

TRUTH = torch.tensor([[10.0, 10, 60, 70, 0], [70, 20, 110, 60, 2]])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_the_anchors_losses_add_up_to_the_criterions():
    logits, anchors = torch.randn(40, 3), torch.rand(40, 4) * 60
    anchors[:, 2:] += anchors[:, :2] + 10
    anchors[:3] = TRUTH[0, :4]
    labels = heatmaps.anchor_labels(anchors, TRUTH)
    assert labels[:3].tolist() == [0, 0, 0] and (labels == BACKGROUND).any()
    losses = focal_loss(logits[:, None], labels[:, None])
    expected, _ = FocalLoss()(logits[None], torch.zeros(1, 40, 4), anchors[None], TRUTH[None])
    assert losses.shape == (40,) and (losses[labels == IGNORE] == 0).all()
    assert (losses.sum() / (labels >= 0).sum()).item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_boxes_all_anchors_are_background():
    assert (heatmaps.anchor_labels(torch.rand(7, 4), torch.zeros(0, 5)) == BACKGROUND).all()


def test_the_cumulative_loss_runs_from_the_cheapest_to_the_dearest():
    share, loss = heatmaps.cumulative_loss(torch.tensor([3.0, 0, 1]))
    np.testing.assert_allclose(share, [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(loss, [0, 0, 1 / 4, 1])


def test_a_larger_gamma_leaves_the_loss_to_fewer_background_anchors():
    """The paper's Figure 4, for a detector that is mostly right."""
    logits = torch.randn(5000, 1) * 2 - 4
    labels = torch.full((5000,), BACKGROUND)
    shares = []
    for gamma in heatmaps.GAMMAS:
        share, loss = heatmaps.cumulative_loss(focal_loss(logits[:, None], labels[:, None], gamma=gamma))
        shares.append(np.interp(0.9, share, loss))  # of the easiest 90 %
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.2 and shares[3] < 0.02


@torch.no_grad()
def test_the_loss_maps_show_the_loss_of_training(filled_net, tmp_path, monkeypatch):
    titles = []
    grid = heatmaps._grid
    monkeypatch.setattr(heatmaps, "_grid", lambda title, size: titles.append(title) or grid(title, size))
    images = torch.randn(1, 3, 96, 128)
    picture = np.zeros((96, 128, 3), dtype=np.uint8)
    logits, labels = heatmaps.draw_loss(filled_net, images, TRUTH, picture, tmp_path / "loss.png")
    expected, _ = filled_net.focalLoss(*filled_net.heads(images), TRUTH[None])
    assert titles[0].startswith(f"class loss {expected.item():.3f} = ")
    assert f"from {(labels >= 0).sum()} positive" in titles[0] and (labels >= 0).any()
    assert len(logits) == len(labels) == len(filled_net.anchors(images)[0])
    assert read(tmp_path / "loss.png").shape[1] > 1500
    heatmaps.draw_cumulative_loss([logits, logits], [labels, labels], 0.25, tmp_path / "curves.png")
    pixels = read(tmp_path / "curves.png").reshape(-1, 3)
    for colour in ("1f77b4", "ff7f0e", "2ca02c", "d62728", "9467bd"):  # matplotlib's first five: one curve a gamma
        assert (pixels == tuple(bytes.fromhex(colour))).all(axis=1).sum() > 100


@torch.no_grad()
def test_the_pyramid_shows_each_levels_best_probability(filled_net, tmp_path, monkeypatch):
    maps = {}
    draw = heatmaps._draw_map
    monkeypatch.setattr(
        heatmaps,
        "_draw_map",
        lambda axes, values, size, title, **kw: maps.update({title: values}) or draw(axes, values, size, title, **kw),
    )
    images = torch.randn(1, 3, 96, 128)
    heatmaps.draw_pyramid(filled_net, images, np.zeros((96, 128, 3), dtype=np.uint8), tmp_path / "pyramid.png")
    probabilities = filled_net.heads(images)[0][0].sigmoid()
    shapes = [tuple(values.shape) for title, values in maps.items() if "at most" in title]
    assert shapes == [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]
    assert maps["all levels"].shape == (96, 128)
    assert maps["all levels"].max().item() == pytest.approx(probabilities.max().item(), abs=1e-5)
    assert sum("locations" in title for title in maps) == 5
    assert read(tmp_path / "pyramid.png").std() > 10
