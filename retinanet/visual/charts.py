"""Numbers -> charts, as PNG files. Needs matplotlib (`pip install matplotlib`), and no display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retinanet.errors import UserError
from retinanet.visual.drawing import class_colour

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEGEND_LIMIT = 20  # names in a column of half a figure's height; numbers in a row of a matrix


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of `width` x `height` inches.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("charts need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def draw_curves(panels: Mapping[str, Mapping[str, np.ndarray]], path: str | Path) -> None:
    """Precision-recall curves.

    Args:
        panels: for each panel's title, for each class's name, [2, N] recall and precision.
        path: of the PNG file.
    """
    figure = new_figure(6 * len(panels) + 2, 6)
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, (name, (recall, precision)) in enumerate(curves.items()):
            colour = np.array(class_colour(label)) / 255
            axes.plot(recall, precision, color=colour, label=name)
        axes.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    handles, names = axes.get_legend_handles_labels()
    rows = 2 * LEGEND_LIMIT
    figure.legend(handles, names, loc="outside right upper", ncols=-(-len(names) // rows), fontsize=8)
    figure.savefig(path)


def draw_training_curves(entries: Sequence[Mapping[str, float]], steps_per_epoch: int, path: str | Path) -> None:
    """Losses, learning rate and AP over the epochs.

    Args:
        entries: of log.jsonl.
        steps_per_epoch: optimizer steps.
        path: of the PNG file.

    Raises:
        UserError: matplotlib is not installed.
    """
    steps = [entry for entry in entries if "step" in entry]
    epochs = [entry for entry in entries if "step" not in entry]
    scored = [entry for entry in epochs if "AP" in entry]
    times = [entry["epoch"] + entry["step"] / steps_per_epoch for entry in steps]
    ends = [entry["epoch"] + 1 for entry in epochs]
    figure = new_figure(15 if scored else 10, 4.5)
    losses, rate, *scores = figure.subplots(1, 3 if scored else 2)
    for name, colour in (("class_loss", "tab:blue"), ("box_loss", "tab:orange")):
        losses.plot(times, [entry[name] for entry in steps], color=colour, alpha=0.35, linewidth=1)
        label = name.replace("_", " ")
        losses.plot(ends, [entry[name] for entry in epochs], color=colour, marker=".", label=label)
    rate.plot(times, [entry["lr"] for entry in steps], color="tab:green", marker="." if len(steps) < 50 else None)
    losses.set(title="training loss")
    rate.set(title="learning rate")
    for axes in (losses, rate):
        axes.margins(y=0.1)
        axes.set(ylim=(0, None))
    for axes in scores:
        for name in ("AP", "AP50", "AP75"):
            values = [entry[name] for entry in scored]
            axes.plot([entry["epoch"] + 1 for entry in scored], values, marker=".", label=name)
        axes.set(title="validation", ylim=(0, 1))
        axes.legend()
    for axes in (losses, rate, *scores):
        axes.set(xlabel="epochs", xlim=(0, None))
        axes.grid(alpha=0.3)
    losses.legend()
    figure.savefig(path)


def draw_bars(values: Mapping[str, float], title: str, path: str | Path) -> None:
    """One horizontal bar a name, with its value written beside it."""
    figure = new_figure(7, 0.5 * len(values) + 1.2)
    axes = figure.subplots()
    bars = axes.barh(list(values), list(values.values()), color="#4878cf")
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set(title=title, xlim=(0, 1.15 * max(*values.values(), 1e-3)))
    axes.invert_yaxis()
    figure.savefig(path)


def draw_matrix(matrix: np.ndarray, names: Sequence[str], title: str, path: str | Path) -> None:
    """A confusion matrix, each row coloured by its shares, with counts where there is room.

    Args:
        matrix: [N, N] counts; rows are the truth, columns what was found.
        names: [N].
        title: above it.
        path: of the PNG file.
    """
    side = min(24, 3.5 + 0.45 * len(names))
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the row", shrink=0.8)
    size = min(9, 260 / len(names))
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set(title=title, xlabel="found", ylabel="truth")
    if len(names) <= LEGEND_LIMIT + 1:
        for row, column in np.ndindex(matrix.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=size)
    figure.savefig(path)
