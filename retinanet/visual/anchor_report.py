"""Results of `anchor_fit` as text, as plain types for a JSON file, and as a chart."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.anchors import Anchors
from retinanet.data.dataset import DetectionDataset
from retinanet.data.report import counted
from retinanet.errors import escaped
from retinanet.matcher import BACKGROUND_IOU, FOREGROUND_IOU
from retinanet.process import log
from retinanet.visual.anchor_fit import WORTHWHILE_IOU, AnchorFit, measure, smallest_side
from retinanet.visual.charts import chart_names, new_figure, save_figure

WARNING_SHARE = 0.05  # share of boxes out of reach above which training warns
WORTHWHILE_SHARE = 0.01  # other anchors are advised if they reach more boxes by at least this share of all
BAR_LIMIT, VALUE_LIMIT = 30, 12  # most groups in a chart, and most groups whose bars have numbers


def summary(fit: AnchorFit) -> str:
    """The fit in one line."""
    if not len(fit.iou):
        return "anchors: there are no boxes to fit"
    side, scale = smallest_side(fit.anchors), float(np.median(fit.boxes.scales))
    return (
        f"anchors: {_percent(fit.coverage(FOREGROUND_IOU))} of the boxes have one of IoU >= {FOREGROUND_IOU}, "
        f"{_percent(fit.coverage(BACKGROUND_IOU))} one of IoU >= {BACKGROUND_IOU}; the smallest square box within "
        f"reach is {side:.1f} px wide after resizing, {side / scale:.1f} px before (in the median image)"
    )


def log_summary(
    dataset: DetectionDataset, anchors: Anchors, min_side: int, max_side: int, best_match_iou: float | None = None
) -> None:
    """Log how the anchors fit the data, with a warning if too many boxes can never be learned; see `measure`."""
    fit = measure(dataset, anchors, min_side, max_side, best_match_iou)
    log.info("%s", summary(fit))
    if fit.unreachable_share > WARNING_SHARE:
        log.warning(
            "warning: %d of %d boxes (%s) can never be learned, because no anchor overlaps them by IoU %g: %srun "
            "`visualize.py --show anchor_fit%s`, with the same flags for data and size, to find anchors that fit",
            fit.unreachable.sum(), len(fit.iou), _percent(fit.unreachable_share), fit.needed_iou,
            "try a larger --min_side, or " if min_side else "",
            "" if best_match_iou is None else f" --best_match_iou {best_match_iou:g}",
        )  # fmt: skip


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def flags(anchors: Anchors) -> str:
    """The scales and ratios as flags of train.py."""
    scales, ratios = (" ".join(f"{value:g}" for value in values) for values in (anchors.scales, anchors.ratios))
    return f"--anchor_scales {scales} --anchor_ratios {ratios}"


def report(fit: AnchorFit, better: AnchorFit, dataset: DetectionDataset, limit: int = 20) -> str:
    """The result as text: coverage by class and size, the boxes out of reach, and the advice.

    At most `limit` classes and boxes out of reach are listed; `better` is the result of `search`.
    """
    content, lines = as_dict(fit, better, dataset), [summary(fit)]
    for title, groups in list(content["coverage"].items())[1:]:
        names = list(groups)
        if len(names) > limit:
            names = sorted(names, key=lambda name: -groups[name]["unreachable"])[:limit]
        width = max(len(title), *(len(escaped(name)) for name in names))
        heading = f"{title:{width}}   boxes  IoU >= 0.5  IoU >= 0.4  mean IoU  "
        lines += ["", heading + "advised anchors" * (better is not fit)]
        for name in names:
            row = groups[name]
            shares = [_percent(row[key]) for key in ("iou_0.5", "iou_0.4", "iou_0.5_advised")]
            cells = f"{escaped(name):{width}} {row['boxes']:7d} {shares[0]:>11} {shares[1]:>11} {row['mean_iou']:9.2f}"
            lines.append(cells + f"{shares[2]:>17}" * (better is not fit))
        lines += ["... and the rest in anchor_fit.json"] * (len(names) < len(groups))
    worst = sorted(content["unreachable"], key=lambda entry: entry["best_iou"])
    lines += ["", f"{counted(len(worst), 'box')} can never be learned (best IoU below {fit.needed_iou:g})"]
    for entry in worst[:limit]:
        box, (width, height) = ", ".join(f"{number:.0f}" for number in entry["box"]), entry["resized"]
        what = f"IoU {entry['best_iou']:.2f}: {escaped(entry['class'])} ({box})"
        lines.append(f"  {what}, {width:.0f} x {height:.0f} px after resizing, in {entry['file']}")
    if len(worst) > limit:
        lines.append(f"  ... and {len(worst) - limit} more, in anchor_fit.json")
    return "\n".join([*lines, "", *_advice(fit, better)])


def _advice(fit: AnchorFit, better: AnchorFit) -> list[str]:
    if better is fit:
        return ["advice: keep these anchors; a search over scales and ratios found none that fit better"]
    more, closer = fit.unreachable_share - better.unreachable_share, better.iou.mean() - fit.iou.mean()
    worthwhile = more >= WORTHWHILE_SHARE or closer >= WORTHWHILE_IOU
    reach = f"{_percent(1 - fit.unreachable_share)} -> {_percent(1 - better.unreachable_share)}"
    lines = [
        f"advice: {'use' if worthwhile else 'keep these anchors; only slightly better:'} {flags(better.anchors)}",
        f"  within reach: {reach} of the boxes; mean best IoU {fit.iou.mean():.3f} -> {better.iou.mean():.3f}",
    ]
    if better.unreachable.any():
        side = np.median(fit.boxes.sides[better.unreachable])
        out = counted(int(better.unreachable.sum()), "box")
        lines.append(f"  out of reach even then: {out}, of a median side of {side:.0f} px after resizing")
    return lines


def as_dict(fit: AnchorFit, better: AnchorFit, dataset: DetectionDataset) -> dict[str, Any]:
    """The result in plain types, with every box out of reach (`box`: pixels of the original image)."""
    coverage = {
        title: {
            name: {
                "boxes": int(chosen.sum()),
                "iou_0.5": fit.coverage(0.5, chosen),
                "iou_0.4": fit.coverage(0.4, chosen),
                "iou_0.5_advised": better.coverage(0.5, chosen),
                "mean_iou": float(fit.iou[chosen].mean()),
                "unreachable": int(fit.unreachable[chosen].sum()),
            }
            for name, chosen in groups.items()
            if chosen.any()
        }
        for title, groups in ({"all": {"all": np.ones(len(fit.iou), dtype=bool)}} | fit.groups()).items()
    }
    unreachable = [
        {
            "file": dataset.find_image(image) or dataset.expected_path(image),
            "class": fit.class_names[fit.boxes.labels[row]],
            "box": (fit.boxes.boxes[row] / fit.boxes.scales[row]).round(2).tolist(),
            "resized": (fit.boxes.boxes[row, 2:] - fit.boxes.boxes[row, :2]).round(2).tolist(),
            "best_iou": round(float(fit.iou[row]), 4),
        }
        for row, image in zip(np.flatnonzero(fit.unreachable), fit.boxes.image_index[fit.unreachable], strict=True)
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
    """Draw the result: best IoUs, coverage by class and by size, and the shapes of boxes and anchors."""
    figure = new_figure(13, 9)
    histogram, by_class, by_size, shapes = figure.subplots(2, 2).flat
    bins = np.linspace(0, 1, 51)
    histogram.hist(fit.iou, bins, color="tab:blue", alpha=0.7, label="these anchors")
    if better is not fit:
        histogram.hist(better.iou, bins, histtype="step", color="black", linewidth=1.5, label="advised anchors")
    histogram.axvline(BACKGROUND_IOU, color="tab:red", linestyle="--", label="background below")
    histogram.axvline(FOREGROUND_IOU, color="tab:red", label="positive from here")
    histogram.set(
        title=f"best IoU of {counted(len(fit.iou), 'box')}", xlabel="IoU of a box with its best anchor", ylabel="boxes"
    )
    histogram.legend(loc="upper left")
    for axes, (title, groups) in zip((by_class, by_size), fit.groups().items(), strict=True):
        _draw_coverage(axes, title, groups, fit, better)
    _draw_shapes(shapes, fit, better)
    save_figure(figure, path)


def _draw_shapes(axes: Any, fit: AnchorFit, better: AnchorFit) -> None:
    """Draw width and height of the boxes, red if they are out of reach, and of the anchors."""
    sizes = fit.boxes.boxes[:, 2:] - fit.boxes.boxes[:, :2]
    for chosen, colour, text in ((~fit.unreachable, "tab:blue", "within reach"), (fit.unreachable, "tab:red", "never")):
        axes.scatter(*sizes[chosen].T, s=8, color=colour, alpha=0.4, label=f"{text}: {chosen.sum()}", linewidths=0)
    for which, marker, text in ((fit, "+", "anchors"), (better, "x", "advised anchors"))[: 1 + (better is not fit)]:
        cells = which.anchors.cells.reshape(-1, 4).cpu().numpy()
        axes.scatter(*(cells[:, 2:] - cells[:, :2]).T, marker=marker, color="black", s=40, alpha=0.7, label=text)
    axes.set(xscale="log", yscale="log", xlabel="width, px after resizing", ylabel="height, px after resizing")
    axes.set_title("shapes of boxes and anchors")
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)


def _draw_coverage(axes: Any, title: str, groups: dict[str, np.ndarray], fit: AnchorFit, better: AnchorFit) -> None:
    """Draw bars of the share of boxes with an anchor of IoU >= 0.5, for the groups with the most boxes."""
    names = dict(zip(groups, chart_names(groups), strict=True))
    counts = {name: int(chosen.sum()) for name, chosen in groups.items() if chosen.any()}
    largest = set(sorted(counts, key=counts.get, reverse=True)[:BAR_LIMIT])
    present = [name for name in counts if name in largest]
    rows = np.arange(len(present))
    key = "" if better is fit else "; blue: these anchors, grey: the advised ones"
    sources = [(fit, "tab:blue")] + [(better, "lightgrey")] * (better is not fit)
    few, height = len(present) <= VALUE_LIMIT, 0.8 / len(sources)
    for number, (source, colour) in enumerate(sources):
        shares = [100 * source.coverage(FOREGROUND_IOU, groups[name]) for name in present]
        bars = axes.barh(rows + number * height, shares, height, color=colour)
        if few:
            axes.bar_label(bars, fmt="%.0f %%", padding=3, fontsize=8)
    captions = [f"{names[name]}: {counts[name]}" for name in present]
    axes.set_yticks(rows + 0.4 - height / 2, captions, fontsize=9 if few else 6)
    axes.set(xlim=(0, 112), xlabel="boxes with an anchor of IoU >= 0.5, %", title=f"by {title}{key}")
    axes.invert_yaxis()
