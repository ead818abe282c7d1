"""The log of a training run -> curves.png."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from retinanet.charts import new_figure


def read_log(path: str | Path) -> list[dict[str, float]]:
    """The entries of a log.jsonl; a last line that is not whole, of a run that is being written, is left out."""
    lines = Path(path).read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def draw_curves(entries: Sequence[Mapping[str, float]], steps_per_epoch: int, path: str | Path) -> None:
    """Losses, learning rate and AP over the epochs, as a PNG file.

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
    figure = new_figure(15, 4.5)
    losses, rate, scores = figure.subplots(1, 3)
    for name, colour in (("class_loss", "tab:blue"), ("box_loss", "tab:orange")):
        losses.plot(times, [entry[name] for entry in steps], color=colour, alpha=0.35, linewidth=1)
        label = name.replace("_", " ")
        losses.plot(ends, [entry[name] for entry in epochs], color=colour, marker=".", label=label)
    rate.plot(times, [entry["lr"] for entry in steps], color="tab:green")
    for name in ("AP", "AP50", "AP75"):
        values = [entry[name] for entry in scored]
        scores.plot([entry["epoch"] + 1 for entry in scored], values, marker=".", label=name)
    losses.set(title="training loss", ylim=(0, None))
    rate.set(title="learning rate", ylim=(0, None))
    scores.set(title="validation", ylim=(0, 1))
    for axes in (losses, rate, scores):
        axes.set(xlabel="epochs", xlim=(0, None))
        axes.grid(alpha=0.3)
    losses.legend()
    scores.legend(loc="lower right")
    temporary = Path(path).with_suffix(".tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
