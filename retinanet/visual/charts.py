"""Charts as PNG files. Needs matplotlib (a UserError says so if it is missing), but no display."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retinanet.data.dataset import DetectionDataset
from retinanet.data.report import counted
from retinanet.errors import UserError, output_file
from retinanet.visual.drawing import class_colour
from retinanet.visual.text import find_font, readable_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEGEND_LIMIT = 20  # legend entries that fill half of a figure's height
CLASS_LIMIT = 40  # most bars in a label chart


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


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a PNG file; text beyond ASCII is drawn in a font that has its letters."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if font := find_font(text.get_text()):
            text.set_fontproperties(FontProperties(fname=font, size=text.get_size()))
    figure.savefig(output_file(path))


def chart_names(names: Iterable[str]) -> list[str]:
    """Class names that matplotlib shows unchanged: `$` starts no formula, and a leading `_` does not hide a name."""
    escaped = [name.replace("$", r"\$") for name in readable_names(names)]
    return [f" {name}" if name.startswith("_") else name for name in escaped]


def add_class_legend(figure: "Figure", lines: Sequence[Any], names: Iterable[str], title: str | None = None) -> None:
    """Add a legend beside the axes, in as many columns as it needs."""
    columns = -(-len(lines) // (2 * LEGEND_LIMIT))
    figure.legend(lines, chart_names(names), loc="outside right upper", ncols=columns, fontsize=8, title=title)


def draw_curves(panels: Mapping[str, Mapping[str, np.ndarray]], path: str | Path) -> None:
    """Draw precision-recall curves: panel title -> class name -> [2, N] recall and precision."""
    figure = new_figure(6 * len(panels) + 2, 6)
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        lines = []
        for label, (recall, precision) in enumerate(curves.values()):
            lines += axes.plot(recall, precision, color=rgb(label))
        axes.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    add_class_legend(figure, lines, curves)
    save_figure(figure, path)


def draw_thresholds(
    names: Sequence[str],
    scores: np.ndarray,
    rates: Sequence[np.ndarray],
    marks: Sequence[tuple[float, float, float, float] | None],
    path: str | Path,
) -> None:
    """Draw precision, recall and F1 over rising scores [N], for each name; the last one, of all classes, is black.

    `rates` has [3, N] for each name: the rates of the detections above each score. `marks` has for each name the score
    to mark and the three rates there, or None.
    """
    figure, lines = new_figure(17, 5.5), []
    colours = [*map(rgb, range(len(names) - 1)), "black"]
    for row, axes in enumerate(figure.subplots(1, 3)):
        for colour, values, mark in zip(colours, rates, marks, strict=True):
            style = {"color": colour, "linewidth": 2 if colour == "black" else 1}
            lines += axes.plot(scores, values[row], drawstyle="steps-post", **style)
            if mark:
                axes.plot(mark[0], mark[1 + row], marker="o", markeredgecolor="black", **style)
        title = ("precision", "recall", "F1")[row]
        axes.set(title=title, xlabel="scores above", xlim=(scores[0], scores[-1]), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    add_class_legend(figure, lines[: len(names)], names, "dots: best F1")
    save_figure(figure, path)


def draw_training_curves(entries: Sequence[Mapping[str, float]], steps_per_epoch: int, path: str | Path) -> None:
    """Draw losses, learning rate and AP over the epochs, from the entries of log.jsonl."""
    steps = [entry for entry in entries if "step" in entry]
    epochs = [entry for entry in entries if "step" not in entry]
    scored = [entry for entry in epochs if "AP" in entry]
    times = [entry["epoch"] + entry["step"] / steps_per_epoch for entry in steps]
    ends = [entry["epoch"] + 1 for entry in epochs]
    figure = new_figure(15 if scored else 10, 4.5)
    panels = figure.subplots(1, 3 if scored else 2)
    losses, rate = panels[:2]
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
    if scored:
        for name in ("AP", "AP50", "AP75"):
            values = [entry[name] for entry in scored]
            panels[2].plot([entry["epoch"] + 1 for entry in scored], values, marker=".", label=name)
        panels[2].set(title="validation", ylim=(0, 1))
        panels[2].legend()
    for axes in panels:
        axes.set(xlabel="epochs", xlim=(0, None))
        axes.grid(alpha=0.3)
    losses.legend()
    save_figure(figure, path)


def rgb(label: int) -> tuple[float, ...]:
    """The colour of a class for matplotlib: red, green and blue, from 0 to 1."""
    return tuple(channel / 255 for channel in class_colour(label))


def draw_label_chart(dataset: DetectionDataset, path: str | Path) -> None:
    """Draw the number of boxes of each class, their sizes and their positions; no image is decoded."""
    annotations, names = dataset.annotations, chart_names(dataset.labels.values())
    counts = np.bincount(annotations[:, 4].astype(int), minlength=len(names))
    shown = np.argsort(-counts, kind="stable")[:CLASS_LIMIT].tolist()
    figure = new_figure(16, max(4.5, 0.2 * len(shown)))
    classes, sizes, positions = figure.subplots(1, 3)
    colours = [rgb(label) for label in shown]
    bars = classes.barh(range(len(shown)), counts[shown], color=colours, edgecolor="black", linewidth=0.5)
    classes.set_yticks(range(len(shown)), [names[label] for label in shown])
    classes.bar_label(bars, padding=3, fontsize=8)
    classes.invert_yaxis()
    classes.margins(x=0.15)
    rest = f"\nthe {len(shown)} most frequent of {len(names)} classes" if len(shown) < len(names) else ""
    empty = len(dataset) - len(np.unique(dataset.image_index))
    total = f"{counted(len(annotations), 'box')} in {counted(len(dataset), 'image')} ({empty} without any)"
    classes.set(title=f"{total}{rest}", xlabel="boxes")
    classes.xaxis.get_major_locator().set_params(integer=True)
    if len(annotations):
        relative = 100 * annotations[:, :4] / np.tile(dataset.image_sizes[dataset.image_index, ::-1], 2)
        _draw_density(sizes, *(relative[:, 2:] - relative[:, :2]).T)
        _draw_density(positions, *((relative[:, 2:] + relative[:, :2]) / 2).T)
    sizes.set(title="sizes of boxes", xlabel="width, % of the image", ylabel="height, % of the image")
    positions.set(title="centres of boxes", xlabel="x, % of the image", ylabel="y, % of the image")
    positions.invert_yaxis()
    save_figure(figure, path)


def _draw_density(axes: Any, x: np.ndarray, y: np.ndarray) -> None:
    """Draw how many points lie in each cell of a grid from 0 to 100 %."""
    counts, _, _ = np.histogram2d(y.clip(0, 100), x.clip(0, 100), bins=50, range=((0, 100), (0, 100)))
    picture = axes.imshow(np.ma.masked_equal(counts, 0), origin="lower", extent=(0, 100, 0, 100), cmap="viridis")
    bar = axes.figure.colorbar(picture, cax=axes.inset_axes([1.03, 0, 0.05, 1]), label="boxes")
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
