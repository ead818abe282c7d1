"""Do these anchors fit my data? Which boxes can be learned, and which anchors would reach more.

A box of which no anchor reaches an IoU of 0.5 is never anybody's target: it cannot be learned, however long the
training. Small objects and long, thin ones are at risk; nothing in a loss curve shows it.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.anchors import Anchors
from retinanet.data.dataset import DetectionDataset
from retinanet.data.report import MIN_SIDE
from retinanet.data.transforms import SIZE_DIVISOR
from retinanet.matcher import BACKGROUND_IOU, FOREGROUND_IOU
from retinanet.process import log

# Sides (the root of the area) that boxes are grouped by: pixels after resizing, one group an octave.
SIZE_EDGES = (0, 16, 32, 64, 128, 256, 512, math.inf)

WARNING_SHARE = 0.05  # of boxes out of reach, from which on training warns
# Other anchors are advised if they reach this share of the boxes more, or raise the mean of the best IoUs by so much.
WORTHWHILE_SHARE, WORTHWHILE_IOU = 0.01, 0.05

SEARCH_BOXES = 1500  # the search looks at no more than these
SEARCH_SCALES, SEARCH_RATIOS = (0.25, 3.0), (1 / 6, 6.0)  # where it looks


@dataclass
class Boxes:
    """A data set's boxes as the network is given them, after resizing.

    Attributes:
        boxes: [N, 4] float64 xyxy, pixels of the padded input.
        labels: [N] int.
        image_index: [N] int: the image of each.
        input_sizes: [N, 2] height and width of its image's padded input, pixels.
        scales: [N] resized size / original size of its image.
    """

    boxes: np.ndarray
    labels: np.ndarray
    image_index: np.ndarray
    input_sizes: np.ndarray
    scales: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> "Boxes":
        """Those of some indices, or of a mask."""
        return Boxes(*(values[chosen] for values in vars(self).values()))

    @property
    def sides(self) -> np.ndarray:
        """[N] the root of the area, pixels after resizing."""
        return np.sqrt((self.boxes[:, 2:] - self.boxes[:, :2]).prod(axis=1))


def resized_boxes(dataset: DetectionDataset, min_side: int, max_side: int) -> Boxes:
    """All boxes of a data set, resized as Resizer does it; pictures are not read, but for their sizes."""
    counts = np.diff(dataset.offsets)
    image_index = np.repeat(np.arange(len(dataset)), counts)
    sizes = np.asarray(dataset.image_sizes, dtype=np.float64).reshape(-1, 2)
    scales = np.minimum(min_side / sizes.min(axis=1), max_side / sizes.max(axis=1))
    resized = np.maximum(1, (sizes * scales[:, None]).round())
    padded = np.ceil(resized / SIZE_DIVISOR) * SIZE_DIVISOR
    # As training sees them: clipped to their pictures, without those of which nothing is left.
    boxes = dataset.annotations[:, :4].astype(np.float64).clip(0, np.tile(sizes[image_index, ::-1], 2))
    kept = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)
    boxes, image_index = boxes[kept], image_index[kept]
    labels = dataset.annotations[kept, 4].astype(np.int64)
    scales = scales[image_index]
    return Boxes(boxes * scales[:, None], labels, image_index, padded[image_index], scales)


def best_ious(boxes: Boxes, anchors: Anchors) -> np.ndarray:
    """The IoU of each box with the anchor that overlaps it most, [N].

    For an anchor of one shape, the overlap only falls as its centre moves away from the box's, in x and in y:
    so of all locations of a level the nearest one is the best, and only as many anchors as one location of each
    level carries need to be looked at.
    """
    centres = (boxes.boxes[:, :2] + boxes.boxes[:, 2:]) / 2
    areas = (boxes.boxes[:, 2:] - boxes.boxes[:, :2]).prod(axis=1, keepdims=True)  # [N, 1]
    best = np.zeros(len(areas))
    for stride, cell in zip(anchors.strides, anchors.cells.cpu().double().numpy(), strict=True):
        last = np.ceil(boxes.input_sizes[:, None, ::-1] / stride) - 1  # [N, 1, 2] column and row
        wanted = centres[:, None] - (cell[:, :2] + cell[:, 2:]) / 2  # [N, num_anchors, 2]
        nearest = (np.floor(wanted / stride).clip(0, last) + 0.5) * stride
        corners = np.tile(nearest, 2) + cell  # [N, num_anchors, 4]
        sides = np.minimum(corners[..., 2:], boxes.boxes[:, None, 2:])
        sides -= np.maximum(corners[..., :2], boxes.boxes[:, None, :2])
        intersection = sides.clip(min=0).prod(axis=2)
        anchor_areas = (cell[:, 2:] - cell[:, :2]).prod(axis=1)
        iou = intersection / np.maximum(areas + anchor_areas - intersection, 1e-8)
        np.maximum(best, iou.max(axis=1), out=best)
    return best


def smallest_side(anchors: Anchors) -> float:
    """The side of the smallest square box, pixels after resizing, that some anchor can overlap enough.

    It lies in the middle of an anchor of w x h: if it fits inside, at IoU = side^2 / (w h).
    """
    sizes = (anchors.cells[..., 2:] - anchors.cells[..., :2]).reshape(-1, 2).double().cpu().numpy()
    sides = np.arange(0.1, float(sizes.max()), 0.1)[:, None]
    intersection = np.minimum(sides, sizes[:, 0]) * np.minimum(sides, sizes[:, 1])
    iou = intersection / (sides**2 + sizes.prod(axis=1) - intersection)
    return float(sides[(iou >= FOREGROUND_IOU).any(axis=1)].min())


@dataclass
class AnchorFit:
    """How well anchors fit boxes.

    Attributes:
        boxes: the boxes.
        anchors: the anchors.
        iou: [N] the best IoU of each box.
        needed_iou: what a box needs to be learned: 0.5, or less if the training keeps each box's best anchor.
        class_names: name of each label.
    """

    boxes: Boxes
    anchors: Anchors
    iou: np.ndarray
    needed_iou: float
    class_names: list[str]

    @property
    def unreachable(self) -> np.ndarray:
        """[N] bool: the boxes that can never be learned."""
        return self.iou < self.needed_iou

    @property
    def unreachable_share(self) -> float:
        """0 to 1."""
        return float(self.unreachable.mean()) if len(self.iou) else 0.0

    def coverage(self, threshold: float, chosen: np.ndarray | slice = slice(None)) -> float:
        """Share of the (chosen) boxes with an anchor of at least this IoU; NaN where there are none."""
        iou = self.iou[chosen]
        return float((iou >= threshold).mean()) if len(iou) else math.nan

    def groups(self) -> dict[str, dict[str, np.ndarray]]:
        """Masks [N] of the boxes of each class and of each size, by name."""
        by_size = np.digitize(self.boxes.sides, SIZE_EDGES) - 1
        sizes = {
            f"{low:g}-{high:g} px" if high < math.inf else f"over {low:g} px": by_size == number
            for number, (low, high) in enumerate(itertools.pairwise(SIZE_EDGES))
        }
        classes = {name: self.boxes.labels == label for label, name in enumerate(self.class_names)}
        return {"class": classes, "side after resizing": sizes}


def measure(
    dataset: DetectionDataset, anchors: Anchors, min_side: int, max_side: int, best_match_iou: float | None = None
) -> AnchorFit:
    """Hold a data set's boxes against anchors.

    Args:
        dataset: gives boxes and image sizes.
        anchors: the anchors.
        min_side: pixels of the resized short side.
        max_side: limit of the resized long side, pixels.
        best_match_iou: as in FocalLoss: what a box's best anchor needs, where the training keeps it.
    """
    boxes = resized_boxes(dataset, min_side, max_side)
    needed = FOREGROUND_IOU if best_match_iou is None else min(FOREGROUND_IOU, best_match_iou)
    return AnchorFit(boxes, anchors, best_ious(boxes, anchors), needed, list(dataset.labels.values()))


def summary(fit: AnchorFit) -> str:
    """The fit in one line, for a header."""
    if not len(fit.iou):
        return "anchors: there are no boxes to fit"
    side, scale = smallest_side(fit.anchors), float(np.median(fit.boxes.scales))
    return (
        f"anchors: {_percent(fit.coverage(FOREGROUND_IOU))} of the boxes have one of IoU >= {FOREGROUND_IOU}, "
        f"{_percent(fit.coverage(BACKGROUND_IOU))} one of IoU >= {BACKGROUND_IOU}; the smallest square box within "
        f"reach is {side:.1f} px wide after resizing, {side / scale:.1f} px before (in the median picture)"
    )


def log_summary(
    dataset: DetectionDataset, anchors: Anchors, min_side: int, max_side: int, best_match_iou: float | None = None
) -> None:
    """Log how the anchors fit the data, with a warning where too many boxes can never be learned.

    The arguments are those of `measure`.
    """
    fit = measure(dataset, anchors, min_side, max_side, best_match_iou)
    log.info("%s", summary(fit))
    if fit.unreachable_share > WARNING_SHARE:
        log.warning(
            "warning: %d of %d boxes (%s) can never be learned, because no anchor overlaps them by IoU %g: try a "
            "larger --min_side, or ask `visualize.py --show anchor_fit%s`, with the same flags for data and size, for "
            "anchors that fit",
            fit.unreachable.sum(), len(fit.iou), _percent(fit.unreachable_share), fit.needed_iou,
            "" if best_match_iou is None else f" --best_match_iou {best_match_iou:g}",
        )  # fmt: skip


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def search(fit: AnchorFit, seed: int = 0) -> AnchorFit:
    """Look for scales and ratios that fit the boxes better, as many as there are now, on the same sizes and strides.

    Differential evolution (Storn and Price, 1997) over the logarithms of the scales and ratios, from those at
    hand, on up to SEARCH_BOXES boxes; what it finds is judged by all boxes.

    Args:
        fit: of the present anchors.
        seed: decides the outcome.

    Returns:
        The fit of the anchors found, which reach no fewer boxes; `fit` itself if none fit better.
    """
    from scipy.optimize import differential_evolution  # slow to import

    now = fit.anchors
    rng = np.random.default_rng(seed)
    sample = fit.boxes[rng.permutation(len(fit.iou))[:SEARCH_BOXES]]
    num_scales = len(now.scales)

    def candidate(logs: np.ndarray) -> Anchors:
        values = np.exp(logs).round(3)
        scales, ratios = sorted(values[:num_scales].tolist()), sorted(values[num_scales:].tolist())
        return Anchors(now.pyramid_levels, now.strides, now.sizes, ratios, scales)

    def badness(logs: np.ndarray) -> float:
        iou = best_ious(sample, candidate(logs))
        return -((iou >= fit.needed_iou).mean() + 0.5 * iou.mean())  # to be reached counts most, then how well

    bounds = [tuple(np.log(SEARCH_SCALES))] * num_scales + [tuple(np.log(SEARCH_RATIOS))] * len(now.ratios)
    start = np.log([*now.scales, *now.ratios]).clip(*np.array(bounds).T)
    found = differential_evolution(badness, bounds, x0=start, maxiter=40, popsize=6, seed=seed, polish=False)
    anchors = candidate(found.x)
    better = AnchorFit(fit.boxes, anchors, best_ious(fit.boxes, anchors), fit.needed_iou, fit.class_names)
    closer = better.iou.mean() - fit.iou.mean() >= WORTHWHILE_IOU and better.unreachable_share <= fit.unreachable_share
    return better if closer or better.unreachable_share < fit.unreachable_share else fit


def flags(anchors: Anchors) -> str:
    """The scales and ratios as flags of train.py."""
    scales, ratios = (" ".join(f"{value:g}" for value in values) for values in (anchors.scales, anchors.ratios))
    return f"--anchor_scales {scales} --anchor_ratios {ratios}"


def report(fit: AnchorFit, better: AnchorFit, dataset: DetectionDataset, limit: int = 20) -> str:
    """The whole answer as text: coverage by class and size, the boxes out of reach, and what would do better.

    Args:
        fit: of the present anchors.
        better: from `search`.
        dataset: names the pictures.
        limit: boxes out of reach, and classes, that are listed.
    """
    lines = [summary(fit)]
    for title, groups in fit.groups().items():
        names = [name for name, chosen in groups.items() if chosen.any()]
        if len(names) > limit:  # those with the most boxes out of reach
            names = sorted(names, key=lambda name: -fit.unreachable[groups[name]].sum())[:limit]
        width = max(len(title), *map(len, names))
        lines += [
            "",
            f"{title:{width}}   boxes  IoU >= 0.5  IoU >= 0.4  mean IoU  " + "advised anchors" * (better is not fit),
        ]
        for name in names:
            chosen = groups[name]
            cells = f"{name:{width}} {chosen.sum():7d} {_percent(fit.coverage(0.5, chosen)):>11} "
            cells += f"{_percent(fit.coverage(0.4, chosen)):>11} {fit.iou[chosen].mean():9.2f}"
            lines.append(cells + f"{_percent(better.coverage(0.5, chosen)):>17}" * (better is not fit))
        if len(names) < sum(chosen.any() for chosen in groups.values()):
            lines.append("... and the rest in anchor_fit.json")
    lines += ["", f"{fit.unreachable.sum()} boxes can never be learned (best IoU below {fit.needed_iou:g})"]
    worst = np.flatnonzero(fit.unreachable)
    worst = worst[np.argsort(fit.iou[worst], kind="stable")]
    for row in worst[:limit]:
        lines.append("  " + _describe(fit, row, dataset))
    if len(worst) > limit:
        lines.append(f"  ... and {len(worst) - limit} more, in anchor_fit.json")
    return "\n".join([*lines, "", *_advice(fit, better)])


def _describe(fit: AnchorFit, row: int, dataset: DetectionDataset) -> str:
    box = fit.boxes.boxes[row]
    width, height = box[2:] - box[:2]
    name = fit.class_names[fit.boxes.labels[row]]
    original = ", ".join(f"{value:.0f}" for value in box / fit.boxes.scales[row])
    return (
        f"IoU {fit.iou[row]:.2f}: {name} ({original}), {width:.0f} x {height:.0f} px after resizing, "
        f"in {dataset.image_path(fit.boxes.image_index[row])}"
    )


def _advice(fit: AnchorFit, better: AnchorFit) -> list[str]:
    if better is fit:
        return ["advice: keep these anchors; a search over scales and ratios found none that fit better"]
    more, closer = fit.unreachable_share - better.unreachable_share, better.iou.mean() - fit.iou.mean()
    worthwhile = more >= WORTHWHILE_SHARE or closer >= WORTHWHILE_IOU
    reach = f"{_percent(1 - fit.unreachable_share)} -> {_percent(1 - better.unreachable_share)}"
    lines = [
        f"advice: {'use' if worthwhile else 'keep these anchors; only a little better are'} {flags(better.anchors)}",
        f"  within reach: {reach} of the boxes; mean best IoU {fit.iou.mean():.3f} -> {better.iou.mean():.3f}",
    ]
    if better.unreachable.any():
        side = np.median(fit.boxes.sides[better.unreachable])
        lines.append(
            f"  {better.unreachable.sum()} boxes stay out of reach, of a median side of {side:.0f} px after resizing"
        )
    return lines


def as_dict(fit: AnchorFit, better: AnchorFit, dataset: DetectionDataset) -> dict[str, Any]:
    """The whole answer in plain types, with every box out of reach (pixels of the original picture)."""
    coverage = {
        title: {
            name: {
                "boxes": int(chosen.sum()),
                "iou_0.5": fit.coverage(0.5, chosen),
                "iou_0.4": fit.coverage(0.4, chosen),
                "iou_0.5_advised": better.coverage(0.5, chosen),
            }
            for name, chosen in groups.items()
            if chosen.any()
        }
        for title, groups in ({"all": {"all": np.ones(len(fit.iou), dtype=bool)}} | fit.groups()).items()
    }
    unreachable = [
        {
            "file": dataset.image_path(fit.boxes.image_index[row]),
            "class": fit.class_names[fit.boxes.labels[row]],
            "box": (fit.boxes.boxes[row] / fit.boxes.scales[row]).round(2).tolist(),
            "best_iou": round(float(fit.iou[row]), 4),
        }
        for row in np.flatnonzero(fit.unreachable)
    ]
    return {
        "anchors": fit.anchors.settings(),
        "needed_iou": fit.needed_iou,
        "smallest_side": smallest_side(fit.anchors),
        "coverage": coverage,
        "unreachable": unreachable,
        "advised": None if better is fit else better.anchors.settings() | {"flags": flags(better.anchors)},
    }


def draw(fit: AnchorFit, better: AnchorFit, path: str | Path) -> None:
    """The answer as a chart: best IoUs, coverage by class and by size, and the boxes' shapes among the anchors'.

    Args:
        fit: of the present anchors.
        better: from `search`.
        path: of the PNG file.
    """
    from retinanet.visual.charts import new_figure

    figure = new_figure(13, 9)
    histogram, by_class, by_size, shapes = figure.subplots(2, 2).flat
    bins = np.linspace(0, 1, 51)
    histogram.hist(fit.iou, bins, color="tab:blue", alpha=0.7, label="these anchors")
    if better is not fit:
        histogram.hist(better.iou, bins, histtype="step", color="black", linewidth=1.5, label="advised anchors")
    for threshold, text in ((BACKGROUND_IOU, "background below"), (FOREGROUND_IOU, "positive from here")):
        histogram.axvline(threshold, color="tab:red", linestyle="--" if threshold < FOREGROUND_IOU else "-", label=text)
    histogram.set(title=f"best IoU of {len(fit.iou)} boxes", xlabel="IoU of a box with its best anchor", ylabel="boxes")
    histogram.legend(loc="upper left")
    for axes, (title, groups) in zip((by_class, by_size), fit.groups().items(), strict=True):
        _draw_coverage(axes, title, groups, fit, better)
    sizes = fit.boxes.boxes[:, 2:] - fit.boxes.boxes[:, :2]
    for chosen, colour, text in ((~fit.unreachable, "tab:blue", "within reach"), (fit.unreachable, "tab:red", "never")):
        shapes.scatter(*sizes[chosen].T, s=8, color=colour, alpha=0.4, label=f"{text}: {chosen.sum()}", linewidths=0)
    for which, marker, text in ((fit, "+", "anchors"), (better, "x", "advised anchors"))[: 1 + (better is not fit)]:
        cells = which.anchors.cells.reshape(-1, 4).cpu().numpy()
        shapes.scatter(*(cells[:, 2:] - cells[:, :2]).T, marker=marker, color="black", s=40, alpha=0.7, label=text)
    shapes.set(xscale="log", yscale="log", xlabel="width, px after resizing", ylabel="height, px after resizing")
    shapes.set_title("shapes of boxes and anchors")
    shapes.legend(loc="upper left")
    shapes.grid(alpha=0.3)
    figure.savefig(path)


def _draw_coverage(axes: Any, title: str, groups: dict[str, np.ndarray], fit: AnchorFit, better: AnchorFit) -> None:
    """Bars of the share of boxes with an anchor of IoU >= 0.5, the 30 groups with the most boxes."""
    present = [name for name, chosen in groups.items() if chosen.any()]
    if len(present) > 30:
        kept = set(sorted(present, key=lambda name: -groups[name].sum())[:30])
        present = [name for name in present if name in kept]
    rows = np.arange(len(present))
    key = "" if better is fit else "; blue: these anchors, grey: the advised ones"
    sources: Sequence[tuple[AnchorFit, str, str]] = [(fit, "tab:blue", "these anchors")]
    if better is not fit:
        sources = [*sources, (better, "lightgrey", "advised anchors")]
    for number, (source, colour, text) in enumerate(sources):
        shares = [100 * source.coverage(FOREGROUND_IOU, groups[name]) for name in present]
        height = 0.8 / len(sources)
        bars = axes.barh(rows + number * height, shares, height, color=colour, label=text)
        if len(present) <= 12:
            axes.bar_label(bars, fmt="%.0f %%", padding=3, fontsize=8)
    size = 9 if len(present) <= 12 else 6
    axes.set_yticks(
        rows + 0.4 - 0.4 / len(sources), [f"{name}: {groups[name].sum()}" for name in present], fontsize=size
    )
    axes.set(xlim=(0, 112), xlabel="boxes with an anchor of IoU >= 0.5, %", title=f"by {title}{key}")
    axes.invert_yaxis()
