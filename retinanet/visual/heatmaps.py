"""Where the network looks and where its loss comes from, as heat maps and curves. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from retinanet.losses import focal_loss
from retinanet.matcher import BACKGROUND, IGNORE, match_anchors
from retinanet.model import RetinaNet
from retinanet.visual.charts import new_figure

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)  # of the paper's Figure 4
CURVE_POINTS = 500


def _level_names(net: RetinaNet) -> list[str]:
    return [f"P{level}" for level in net.anchors.pyramid_levels]


def _grid(title: str, size: tuple[int, int]) -> tuple[Any, np.ndarray]:
    """A figure of two rows and six columns of pictures, for an image of `size` (height, width)."""
    figure = new_figure(19, 2 * 3.1 * min(1.6, max(0.6, size[0] / size[1])) + 1.4)
    figure.suptitle(title)
    axes = figure.subplots(2, 6)
    for cell in axes.flat:
        cell.tick_params(labelsize=7)
    return figure, axes


def _draw_map(axes: Any, values: Tensor, size: tuple[int, int], title: str, **options: Any) -> Any:
    """One level's numbers [rows, columns], laid over the pixels of the image that they stand for."""
    axes.set_title(title, fontsize=9)
    return axes.imshow(values.cpu().numpy(), extent=(0, size[1], size[0], 0), **options)


@torch.no_grad()
def draw_pyramid(net: RetinaNet, images: Tensor, picture: np.ndarray, path: str | Path) -> None:
    """Each level's activations, and its highest class probability at each location.

    Args:
        net: in evaluation mode.
        images: [1, 3, H, W] normalised.
        picture: [H, W, 3] uint8: the same to look at.
        path: of the PNG file.

    Raises:
        UserError: matplotlib is not installed.
    """
    size = picture.shape[:2]
    figure, axes = _grid(
        "the pyramid: norm of the activations over the channels (above), highest class probability (below)", size
    )
    pyramid = net.fpn(net.backbone(images))
    best = []
    for level in pyramid:
        probabilities = net.classificationModel(level)[0].float().sigmoid()  # [rows * columns * num_anchors, K]
        best.append(probabilities.reshape(*level.shape[-2:], -1).amax(dim=2))
    highest = max(float(values.max()) for values in best)
    for column, (name, level, probability) in enumerate(zip(_level_names(net), pyramid, best, strict=True), start=1):
        rows, columns = probability.shape
        activation = level[0].float().norm(dim=0)  # over the channels
        _draw_map(axes[0, column], activation, size, f"{name}: {rows} x {columns} locations", cmap="magma", vmin=0)
        title = f"{name}: at most {probability.max():.2f}"
        heat = _draw_map(axes[1, column], probability, size, title, cmap="inferno", vmin=0, vmax=highest)
    figure.colorbar(heat, ax=axes[1, :], label="probability", shrink=0.8)
    _draw_map(axes[0, 0], torch.tensor(picture), size, "the network's input")
    # At each pixel the best of all levels, [1, H, W].
    everywhere = torch.cat([interpolate(probability[None, None], size) for probability in best]).amax(dim=0)
    _draw_map(axes[1, 0], everywhere[0], size, "all levels", cmap="inferno", vmin=0, vmax=highest)
    figure.savefig(path)


def anchor_labels(anchors: Tensor, truth: Tensor, best_match_iou: float | None = None) -> Tensor:
    """The class that each of [A, 4] anchors must find for the truth [G, 5]: [A] int64, or BACKGROUND, or IGNORE."""
    rows = truth if len(truth) else truth.new_full((1, 5), -1)
    matches = match_anchors(anchors, rows[None], best_match_iou)[0]
    return torch.where(matches >= 0, rows[matches.clamp(min=0), 4].long(), matches)


@torch.no_grad()
def draw_loss(
    net: RetinaNet, images: Tensor, truth: Tensor, picture: np.ndarray, path: str | Path
) -> tuple[Tensor, Tensor]:
    """Where the class loss comes from: the loss of the anchors at each location, of objects and of background.

    Args:
        net: in evaluation mode.
        images: [1, 3, H, W] normalised.
        truth: [G, 5] (x1, y1, x2, y2, label), pixels of the input.
        picture: [H, W, 3] uint8: the input to look at, with its truth drawn on it.
        path: of the PNG file.

    Returns:
        The logits [A, K] and the anchors' labels [A], for `draw_cumulative_loss`.

    Raises:
        UserError: matplotlib is not installed.
    """
    size = tuple(images.shape[-2:])
    logits, _, anchors = net.heads(images)
    logits = logits[0].float()
    criterion = net.focalLoss
    labels = anchor_labels(anchors[0], truth.to(anchors.device), criterion.best_match_iou)
    # [A] each anchor's loss, for each is taken for an image of its own.
    losses = focal_loss(logits[:, None], labels[:, None], criterion.alpha, criterion.gamma)
    losses = losses / (labels >= 0).sum().clamp(min=1)  # as the criterion does
    kinds = {"objects": labels >= 0, "background": labels == BACKGROUND}
    sums = {kind: float(losses[chosen].sum()) for kind, chosen in kinds.items()}
    counts = {kind: int(chosen.sum()) for kind, chosen in kinds.items()}
    figure, axes = _grid(
        f"class loss {sum(sums.values()):.3f} = {sums['objects']:.3f} from {counts['objects']} positive anchors (above)"
        f" + {sums['background']:.3f} from {counts['background']} background anchors (below); "
        f"{int((labels == IGNORE).sum())} are ignored",
        size,
    )
    shapes = net.anchors.level_shapes(*size)
    level_sizes = [rows * columns * net.anchors.num_anchors for rows, columns in shapes]
    shares = {kind: [] for kind in kinds}
    for row, (kind, chosen) in enumerate(kinds.items()):
        parts = torch.where(chosen, losses, 0).split(level_sizes)
        # Loss at each location, all levels on one scale of colours.
        maps = [part.reshape(*shape, -1).sum(dim=2) for part, shape in zip(parts, shapes, strict=True)]
        highest = max(float(values.max()) for values in maps) or 1.0
        for column, (name, values) in enumerate(zip(_level_names(net), maps, strict=True), start=1):
            shares[kind].append(float(values.sum()))
            title = f"{name}: {values.sum():.3f}"
            heat = _draw_map(axes[row, column], values, size, title, cmap="inferno", vmin=0, vmax=highest)
        figure.colorbar(heat, ax=axes[row, :], label=f"loss of the {kind}", shrink=0.8)
    _draw_map(axes[0, 0], torch.tensor(picture), size, "the network's input and the truth")
    bars = axes[1, 0]
    positions = np.arange(len(shapes))
    for offset, (kind, values) in zip((-0.2, 0.2), shares.items(), strict=True):
        bars.bar(positions + offset, values, 0.4, label=kind, color="tab:orange" if offset < 0 else "tab:blue")
    bars.set_xticks(positions, _level_names(net))
    bars.set_title("loss by level", fontsize=9)
    bars.legend(fontsize=7)
    figure.savefig(path)
    return logits.cpu(), labels.cpu()


def cumulative_loss(losses: Tensor) -> np.ndarray:
    """How much of the whole loss the cheapest share of anchors makes up: [2, N] share of anchors, share of loss."""
    ordered = losses.double().sort().values
    share = torch.cat([torch.zeros(1, dtype=torch.float64), ordered.cumsum(dim=0) / ordered.sum()])
    return np.stack([np.linspace(0, 1, len(share)), share.numpy()])


def draw_cumulative_loss(logits: Sequence[Tensor], labels: Sequence[Tensor], alpha: float, path: str | Path) -> None:
    """The paper's Figure 4 for these anchors: the cumulative loss of objects and of background, for each gamma.

    The larger gamma, the fewer background anchors make up the loss; the objects' loss hardly changes.

    Args:
        logits: [A, K] of each image.
        labels: [A] of each image, from `anchor_labels`.
        alpha: as in `losses.focal_loss`.
        path: of the PNG file.

    Raises:
        UserError: matplotlib is not installed.
    """
    logits, labels = torch.cat(list(logits)), torch.cat(list(labels))
    figure = new_figure(12, 5)
    figure.suptitle("cumulative focal loss over the anchors, from the cheapest to the dearest (the paper's Figure 4)")
    panels = figure.subplots(1, 2)
    for axes, kind, chosen in zip(panels, ("positive", "background"), (labels >= 0, labels == BACKGROUND), strict=True):
        for gamma in GAMMAS if chosen.any() else ():
            curve = cumulative_loss(focal_loss(logits[chosen, None], labels[chosen, None], alpha, gamma))
            points = np.unique(np.linspace(0, curve.shape[1] - 1, CURVE_POINTS).round().astype(int))
            axes.plot(*curve[:, points], label=f"gamma = {gamma:g}")
        axes.set(
            xlabel=f"share of the {int(chosen.sum())} {kind} anchors",
            ylabel="share of their loss",
            title=f"{kind} anchors",
        )
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        if chosen.any():
            axes.legend(loc="upper left")
    figure.savefig(path)
