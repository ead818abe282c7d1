"""The progress of a run, which checkpoints carry, and the meter that counts and reports its steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from retinanet import process


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0
    step: int = 0  # optimizer steps of the epoch that are done
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])  # class loss and box loss, summed over these steps
    recent: list[float] = field(default_factory=lambda: [0.0, 0.0, 0])  # these sums and steps since the last log entry

    def add(self, class_loss: float, box_loss: float) -> None:
        """Count a step."""
        self.step += 1
        self.sums = [self.sums[0] + class_loss, self.sums[1] + box_loss]
        self.recent = [self.recent[0] + class_loss, self.recent[1] + box_loss, self.recent[2] + 1]


class Meter:
    """Counts the steps of an epoch, and reports them every `log_every` steps, in a progress bar and in the log.

    `progress` says where the epoch starts, and is kept up to date; `bar` yields the numbers of the remaining steps.
    """

    def __init__(
        self,
        progress: Progress,
        num_steps: int,
        log_every: int,
        log_step: Callable[[dict[str, float]], None],
        outlook: Callable[[], str],
    ):
        self.progress, self.num_steps, self.log_every = progress, num_steps, log_every
        self.log_step, self.outlook = log_step, outlook  # see `train_one_epoch`
        steps = range(progress.step, num_steps)
        self.bar = process.progress(steps, f"epoch {progress.epoch}", num_steps, progress.step)
        self.num_images = self.recent_images = 0
        self.start = self.recent_start = time.perf_counter()

    def count(self, losses: Tensor, group: list[dict[str, Any]], lr: float, norm: Callable[[], dict]) -> None:
        """Count a step with `losses` [ranks, batches, 2] on the batches `group`.

        `norm` returns numbers about the gradient. It may wait for a GPU, so it is called only for entries of the log.
        """
        progress = self.progress
        progress.add(*losses.double().mean(dim=(0, 1)).tolist())
        num_images = process.get_world_size() * sum(len(batch["img"]) for batch in group)
        self.num_images += num_images
        self.recent_images += num_images
        if progress.step % self.log_every and progress.step != self.num_steps:
            return
        class_loss, box_loss, steps = progress.recent
        progress.recent = [0.0, 0.0, 0]
        entry = {"epoch": progress.epoch, "step": progress.step}
        entry |= {"class_loss": class_loss / steps, "box_loss": box_loss / steps, "lr": lr, **norm()}
        entry["images_per_second"] = self.recent_images / (time.perf_counter() - self.recent_start)
        text = "class {class_loss:.3f}, box {box_loss:.3f}, lr {lr:.1e}, {images_per_second:.1f} images/s"
        self.bar.set_postfix_str(text.format(**entry) + self.outlook())
        self.log_step(entry)
        self.recent_images, self.recent_start = 0, time.perf_counter()

    def statistics(self) -> dict[str, float]:
        """The epoch's mean `class_loss`, `box_loss` and `loss`, and `images_per_second` since the meter was created."""
        class_loss, box_loss = (value / max(1, self.progress.step) for value in self.progress.sums)
        speed = self.num_images / (time.perf_counter() - self.start)
        losses = {"class_loss": class_loss, "box_loss": box_loss, "loss": class_loss + box_loss}
        return losses | {"images_per_second": speed}
