import numpy as np
import pytest
import torch
from PIL import Image

from retinanet.losses import focal_loss
from retinanet.matcher import BACKGROUND, IGNORE

pytest.importorskip("matplotlib")
from retinanet.visual import heatmaps

ANNOTATIONS = torch.tensor([[10.0, 10, 60, 70, 0], [70, 20, 110, 60, 2]])
IMAGES = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
PICTURE = np.zeros((96, 128, 3), dtype=np.uint8)


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@torch.no_grad()
@pytest.mark.parametrize("annotations", [ANNOTATIONS, ANNOTATIONS[:0]], ids=["two boxes", "no boxes"])
def test_the_anchors_losses_add_up_to_the_criterions(filled_net, annotations):
    result = heatmaps.anchor_losses(filled_net, IMAGES, annotations)
    logits, deltas, anchors = filled_net.heads(IMAGES)
    expected, _ = filled_net.focalLoss(logits, deltas, anchors, annotations[None])
    assert result.losses.sum().item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(result.logits, logits[0]) and len(result.labels) == anchors.shape[1]
    assert (result.losses[result.labels == IGNORE] == 0).all()
    assert set(result.labels[result.labels >= 0].tolist()) == set(annotations[:, 4].int().tolist())
    assert (result.labels == BACKGROUND).all() == (len(annotations) == 0)


@torch.no_grad()
def test_the_pyramid_maps_hold_each_levels_best_probability(filled_net):
    maps = heatmaps.pyramid_maps(filled_net, IMAGES)
    assert [tuple(best.shape) for _, best in maps] == [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]
    assert all(activations.shape == best.shape for activations, best in maps)
    probabilities = filled_net.heads(IMAGES)[0][0].sigmoid()
    highest = max(best.max().item() for _, best in maps)
    assert highest == pytest.approx(probabilities.max().item(), abs=1e-5)


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
        share, loss = heatmaps.cumulative_loss(focal_loss(logits, labels, gamma=gamma))
        shares.append(np.interp(0.9, share, loss))  # of the easiest 90 %
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.2 and shares[3] < 0.02


def test_the_charts_are_written(filled_net, tmp_path):
    heatmaps.draw_pyramid(filled_net, IMAGES, PICTURE, tmp_path / "pyramid.png")
    assert read(tmp_path / "pyramid.png").std() > 10
    results = [heatmaps.draw_loss(filled_net, IMAGES, ANNOTATIONS, PICTURE, tmp_path / "loss.png")]
    assert read(tmp_path / "loss.png").shape[1] > 1500
    heatmaps.draw_cumulative_loss(results, 0.25, tmp_path / "curves.png")
    pixels = read(tmp_path / "curves.png").reshape(-1, 3)
    for colour in ("1f77b4", "ff7f0e", "2ca02c", "d62728", "9467bd"):  # matplotlib's first five: one curve a gamma
        assert (pixels == tuple(bytes.fromhex(colour))).all(axis=1).sum() > 100
    without_boxes = heatmaps.anchor_losses(filled_net, IMAGES, ANNOTATIONS[:0])
    heatmaps.draw_cumulative_loss([without_boxes], 0.25, tmp_path / "background.png")
    assert (tmp_path / "background.png").exists()
