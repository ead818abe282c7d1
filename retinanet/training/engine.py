"""The two loops: one epoch of training, and detection over a whole data set; in one process, or in many."""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from retinanet.data.loader import explained
from retinanet.data.transforms import normalize
from retinanet.errors import UserError
from retinanet.process import gather_tensors, get_rank, get_world_size, undisturbed
from retinanet.process import progress as progress_bar
from retinanet.training.recipes import Schedule


@dataclass
class Progress:
    """How far a run has come; with weights, optimizer and schedule it is all that a run needs to go on.

    Attributes:
        epoch: the one that runs, from 0.
        step: optimizer steps of it that are done.
        sums: of class loss and box loss over these steps.
        recent: sums of class loss and box loss since the last log line, and their number of steps.
    """

    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    recent: list[float] = field(default_factory=lambda: [0.0, 0.0, 0])

    def add(self, class_loss: float, box_loss: float) -> None:
        """Count a step."""
        self.step += 1
        self.sums = [self.sums[0] + class_loss, self.sums[1] + box_loss]
        self.recent = [self.recent[0] + class_loss, self.recent[1] + box_loss, self.recent[2] + 1]

    def take_recent(self) -> tuple[float, float]:
        """Mean class loss and box loss since the last call."""
        class_loss, box_loss, steps = self.recent
        self.recent = [0.0, 0.0, 0]
        return class_loss / steps, box_loss / steps


class NotFiniteError(UserError):
    """A loss or a gradient is not finite.

    Attributes:
        batches: of this process, in which it happened.
    """

    def __init__(self, message: str, batches: list[dict[str, Any]]):
        super().__init__(message)
        self.batches = batches


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    device: torch.device,
    precision: torch.dtype,
    progress: Progress,
    clip_norm: float | None = None,
    accumulate: int = 1,
    wish: Callable[[], int] | None = None,
    after_step: Callable[[int], None] | None = None,
    log_step: Callable[[dict[str, float]], None] | None = None,
    log_every: int = 20,
) -> dict[str, float]:
    """Train on every batch of `loader` once.

    Args:
        model: in training mode, gives class loss and box loss; may be wrapped in DistributedDataParallel.
        loader: batches from `collater`, with the length of the whole epoch; it gives those from `progress.step` on.
        optimizer: stepped after every `accumulate` batches.
        schedule: stepped with it.
        device: where the model is.
        precision: of the network's arithmetic: torch.float32 or torch.bfloat16.
        progress: where to start; kept up to date.
        clip_norm: limit of the gradient's norm.
        accumulate: batches whose gradients are averaged for one step.
        wish: asked before every step for a number, such as a signal's, or 0; all ranks learn the largest.
        after_step: called after every optimizer step with that number: for an EMA's update, a checkpoint, a stop.
        log_step: called every `log_every` steps with their mean losses, the rate, the gradient's norm and images/s.
        log_every: optimizer steps.

    Returns:
        The epoch's mean `class_loss`, `box_loss` and `loss`, over all ranks, and `images_per_second`.

    Raises:
        NotFiniteError: a loss or the gradient is not finite; the message names epoch, step and images.
        UserError: memory is short, or a picture cannot be read.
    """
    model.train()
    num_steps = -(-len(loader) // accumulate)
    batches = iter(loader) if progress.step < num_steps else iter(())
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    check_norm = None
    num_images, recent_images = 0, 0
    start = recent_start = time.perf_counter()
    bar = progress_bar(range(progress.step, num_steps), f"epoch {progress.epoch}", num_steps, progress.step)
    with explained(loader, precision) as seen:
        for step in bar:
            seen.clear()
            group = list(islice(batches, accumulate))
            seen["shape"] = tuple(max(sizes) for sizes in zip(*(batch["img"].shape for batch in group), strict=True))
            number = wish() if wish else 0
            losses, number = _accumulate_gradients(model, group, device, precision, number)  # [ranks, batches, 2]
            where = f"in epoch {progress.epoch}, step {step + 1}"
            if check_norm:  # of the step before: asked now, it has long arrived, and the device need not wait
                check_norm()
            _check_losses(losses, where, group, loader)
            lr = optimizer.param_groups[0]["lr"]
            check_norm = _clip(weights, clip_norm, where, group, loader)
            with undisturbed():  # weights, schedule, average and checkpoint change together
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                progress.add(*losses.double().mean(dim=(0, 1)).tolist())

                images_now = get_world_size() * sum(len(batch["img"]) for batch in group)
                num_images, recent_images = num_images + images_now, recent_images + images_now
                if (step + 1) % log_every == 0 or step + 1 == num_steps:
                    class_loss, box_loss = progress.take_recent()
                    entry = {
                        "epoch": progress.epoch,
                        "step": step + 1,
                        "class_loss": class_loss,
                        "box_loss": box_loss,
                        "lr": lr,
                        "grad_norm": check_norm(),
                        "images_per_second": recent_images / (time.perf_counter() - recent_start),
                    }
                    speed = f"{entry['images_per_second']:.1f} images/s"
                    bar.set_postfix_str(f"class {class_loss:.3f}, box {box_loss:.3f}, lr {lr:.1e}, {speed}")
                    if log_step is not None:
                        log_step(entry)
                    recent_images, recent_start = 0, time.perf_counter()
                if after_step is not None:
                    after_step(number)
    class_loss, box_loss = (value / max(1, progress.step) for value in progress.sums)
    return {
        "class_loss": class_loss,
        "box_loss": box_loss,
        "loss": class_loss + box_loss,
        "images_per_second": num_images / (time.perf_counter() - start),
    }


def _accumulate_gradients(
    model: nn.Module, group: list[dict[str, Any]], device: torch.device, precision: torch.dtype, number: int
) -> tuple[Tensor, int]:
    """Forward and backward of the batches of one optimizer step.

    Returns:
        The losses of all ranks, [ranks, batches, 2] on the CPU, and the largest `number` of all ranks.
    """
    values = []
    for batch in group:
        is_last = batch is group[-1]
        images = normalize(batch["img"].to(device, non_blocking=True))
        annotations = batch["annot"].to(device, non_blocking=True)
        # Ranks average their gradients once a step, in the backward pass of its last batch.
        with contextlib.nullcontext() if is_last or get_world_size() == 1 else model.no_sync():
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                losses = torch.cat(model([images, annotations]))  # class loss, box loss
            values.append(losses.detach())
            if is_last:
                # Sent off before the backward pass, so that they are here while the device is still busy with it.
                report = _fetch(gather_tensors(torch.cat([*values, losses.new_full((1,), number)])))
            (losses.sum() / len(group)).backward()
    found = report()  # [ranks, 2 * batches + 1]
    return found[:, :-1].view(len(found), len(group), 2), int(found[:, -1].max())


def _fetch(values: Tensor) -> Callable[[], Tensor]:
    """Send numbers to the CPU. Calling the result waits for them, but not for what the device was told since."""
    if values.device.type != "cuda":
        here = values.cpu()
        return lambda: here
    here, arrived = values.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(values.device))

    def wait() -> Tensor:
        arrived.synchronize()
        return here

    return wait


def _check_losses(losses: Tensor, where: str, group: list[dict[str, Any]], loader: Iterable) -> None:
    """Raise NotFiniteError, on all ranks, if a loss of any of them is not finite."""
    finite = losses.isfinite().all(dim=2)  # [ranks, batches]
    if finite.all():
        return
    bad = [batch for batch, fine in zip(group, finite[get_rank()], strict=True) if not fine]
    rank = int((~finite.all(dim=1)).nonzero()[0])
    class_loss, box_loss = losses[rank, int((~finite[rank]).nonzero()[0])].tolist()
    whose = f"images {_names(bad, loader)}" if bad else f"images of rank {rank}"
    raise NotFiniteError(
        f"the loss is not finite (class {class_loss}, box {box_loss}) {where}, {whose}: "
        "lower the learning rate (--lr), or look at these images' boxes",
        bad,
    )


def _clip(
    weights: list[nn.Parameter], clip_norm: float | None, where: str, group: list[dict[str, Any]], loader: Iterable
) -> Callable[[], float]:
    """Clip the gradient. Calling the result gives its norm before, and raises NotFiniteError if that is not finite."""
    if clip_norm is None:
        norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    else:
        norm = nn.utils.clip_grad_norm_(weights, clip_norm)
    arrived = _fetch(norm)

    def check() -> float:
        if not arrived().isfinite():
            raise NotFiniteError(
                f"the gradient's norm is not finite ({arrived()}) {where}, images {_names(group, loader)}: "
                "lower the learning rate (--lr), or clip the gradient (--clip_norm)",
                group,
            )
        return arrived().item()

    return check


def _names(batches: list[dict[str, Any]], loader: Iterable) -> str:
    """The pictures of batches, by path where the loader's data set knows it, else by index."""
    indices = [index for batch in batches for index in batch["index"]]
    path = getattr(getattr(loader, "dataset", None), "image_path", str)
    return ", ".join(path(index) for index in indices)
