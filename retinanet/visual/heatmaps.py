"""Heat maps and curves of the network's activations and of where its loss comes from. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from retinanet.losses import focal_loss
from retinanet.matcher import BACKGROUND, IGNORE
from retinanet.model import RetinaNet
from retinanet.visual.charts import new_figure, save_figure

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)  # of the paper's Figure 4
CURVE_POINTS = 500


def _grid(title: str, size: tuple[int, int]) -> tuple[Any, np.ndarray]:
    """A figure with two rows and six columns of axes, for an image of `size` (height, width)."""
    figure = new_figure(19, 2 * 3.1 * min(1.6, max(0.6, size[0] / size[1])) + 1.4)
    figure.suptitle(title)
    axes = figure.subplots(2, 6)
    for cell in axes.flat:
        cell.tick_params(labelsize=7)
    return figure, axes


def _draw_map(axes: Any, values: Tensor | np.ndarray, size: tuple[int, int], title: str, **options: Any) -> Any:
    """Draw the numbers of one level [rows, columns], scaled to the size of the image in pixels."""
    axes.set_title(title, fontsize=9)
    return axes.imshow(np.asarray(values), extent=(0, size[1], size[0], 0), **options)


@torch.no_grad()
def pyramid_maps(net: RetinaNet, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The norm of the activations over the channels, and the highest class probability, at each location of each level.

    Takes images [1, 3, H, W], normalised, and returns two maps [rows, columns] for each level, on the CPU.
    """
    maps = []
    for level in net.fpn(net.backbone(images)):
        probabilities = net.classificationModel(level)[0].float().sigmoid()  # [rows * columns * num_anchors, K]
        best = probabilities.reshape(*level.shape[-2:], -1).amax(dim=2)
        maps.append((level[0].float().norm(dim=0).cpu(), best.cpu()))
    return maps


def draw_pyramid(net: RetinaNet, images: Tensor, picture: np.ndarray, path: str | Path) -> None:
    """Draw `pyramid_maps` of images [1, 3, H, W] beside `picture`, the same image as [H, W, 3] uint8."""
    size = picture.shape[:2]
    title = "the pyramid: norm of the activations over the channels (above), highest class probability (below)"
    figure, axes = _grid(title, size)
    maps = pyramid_maps(net, images)
    scale = {"cmap": "inferno", "vmin": 0, "vmax": max(float(best.max()) for _, best in maps)}
    for above, below, level, (activations, best) in zip(*axes[:, 1:], net.anchors.pyramid_levels, maps, strict=True):
        rows, columns = best.shape
        _draw_map(above, activations, size, f"P{level}: {rows} x {columns} locations", cmap="magma", vmin=0)
        heat = _draw_map(below, best, size, f"P{level}: at most {best.max():.2f}", **scale)
    figure.colorbar(heat, ax=axes[1, :], label="probability", shrink=0.8)
    _draw_map(axes[0, 0], picture, size, "the network's input")
    # The highest probability of all levels at each pixel, [H, W].
    everywhere = torch.cat([interpolate(best[None, None], size) for _, best in maps]).amax(dim=0)[0]
    _draw_map(axes[1, 0], everywhere, size, "all levels", **scale)
    save_figure(figure, path)


class AnchorLosses(NamedTuple):
    """The logits, labels and losses of the anchors of one image, on the CPU."""

    logits: Tensor  # [A, K]
    labels: Tensor  # [A] int64: the class that each anchor must find, or BACKGROUND, or IGNORE
    losses: Tensor  # [A] the part of the image's class loss that comes from each anchor


@torch.no_grad()
def anchor_losses(net: RetinaNet, images: Tensor, annotations: Tensor) -> AnchorLosses:
    """Split the class loss of images [1, 3, H, W] with annotations [G, 5] into the parts of the anchors."""
    criterion = net.focalLoss
    logits, _, anchors = net.heads(images)
    labels, _ = criterion.assign(anchors, annotations[None].to(anchors.device), net.num_classes)
    logits, labels = logits[0], labels[0]  # [A, K], [A]
    losses = focal_loss(logits, labels, criterion.alpha, criterion.gamma)
    losses = losses / (labels >= 0).sum().clamp(min=1)  # as the criterion does
    return AnchorLosses(logits.float().cpu(), labels.cpu(), losses.cpu())


def draw_loss(
    net: RetinaNet, images: Tensor, annotations: Tensor, picture: np.ndarray, path: str | Path
) -> AnchorLosses:
    """Draw where the class loss comes from: maps of the loss of positive anchors and of background anchors.

    The arguments are those of `anchor_losses`, and `picture`, the image with its annotations as [H, W, 3] uint8.
    Returns the losses, for `draw_cumulative_loss`.
    """
    result, size = anchor_losses(net, images, annotations), tuple(images.shape[-2:])
    kinds = {"objects": result.labels >= 0, "background": result.labels == BACKGROUND}
    of_objects, of_background = (result.losses[chosen].sum() for chosen in kinds.values())
    title = (
        f"class loss {of_objects + of_background:.3f} = {of_objects:.3f} from {kinds['objects'].sum()} positive anchors"
        f" (above) + {of_background:.3f} from {kinds['background'].sum()} background anchors (below); "
        f"{(result.labels == IGNORE).sum()} are ignored"
    )
    figure, axes = _grid(title, size)
    shapes, names = net.anchors.level_shapes(*size), [f"P{level}" for level in net.anchors.pyramid_levels]
    _draw_map(axes[0, 0], picture, size, "the network's input and the annotations")
    for row, (kind, chosen) in enumerate(kinds.items()):
        parts = torch.where(chosen, result.losses, 0).split(net.anchors.level_sizes(*size))
        # The loss at each location, all levels on one colour scale.
        maps = [part.reshape(*shape, -1).sum(dim=2) for part, shape in zip(parts, shapes, strict=True)]
        scale = {"cmap": "inferno", "vmin": 0, "vmax": max(float(values.max()) for values in maps) or 1.0}
        shares = [float(values.sum()) for values in maps]
        for cell, name, values, share in zip(axes[row, 1:], names, maps, shares, strict=True):
            heat = _draw_map(cell, values, size, f"{name}: {share:.3f}", **scale)
        figure.colorbar(heat, ax=axes[row, :], label=f"loss of the {kind}", shrink=0.8)
        axes[1, 0].bar(np.arange(len(names)) + 0.4 * row - 0.2, shares, 0.4, label=kind, color=f"C{1 - row}")
    axes[1, 0].set_xticks(range(len(names)), names)
    axes[1, 0].set_title("loss by level", fontsize=9)
    axes[1, 0].legend(fontsize=7)
    save_figure(figure, path)
    return result


def cumulative_loss(losses: Tensor) -> np.ndarray:
    """[2, N]: shares of the anchors, smallest losses first, and the shares of the loss that these anchors make up."""
    ordered = losses.double().sort().values
    share = torch.cat([torch.zeros(1, dtype=torch.float64), ordered.cumsum(dim=0) / ordered.sum()])
    return np.stack([np.linspace(0, 1, len(share)), share.numpy()])


def draw_cumulative_loss(results: Sequence[AnchorLosses], alpha: float, path: str | Path) -> None:
    """Draw the paper's Figure 4 for these images: the cumulative loss of positive and of background anchors, by gamma.

    The larger gamma is, the fewer background anchors make up the loss; for positive anchors it hardly changes.
    """
    logits = torch.cat([result.logits for result in results])
    labels = torch.cat([result.labels for result in results])
    figure = new_figure(12, 5)
    figure.suptitle("cumulative focal loss over the anchors, sorted by their loss (the paper's Figure 4)")
    kinds = {"positive": labels >= 0, "background": labels == BACKGROUND}
    for axes, (kind, chosen) in zip(figure.subplots(1, 2), kinds.items(), strict=True):
        for gamma in GAMMAS:
            curve = cumulative_loss(focal_loss(logits[chosen], labels[chosen], alpha, gamma))
            points = np.unique(np.linspace(0, curve.shape[1] - 1, CURVE_POINTS).round().astype(int))
            axes.plot(*curve[:, points], label=f"gamma = {gamma:g}")
        share = f"share of the {int(chosen.sum())} {kind} anchors"
        axes.set(xlabel=share, ylabel="share of their loss", title=f"{kind} anchors", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
    save_figure(figure, path)
