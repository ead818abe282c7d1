"""The two loops: one epoch of training, and detection over a whole data set."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from retinanet.optim import Schedule
from retinanet.postprocess import Detections
from retinanet.transforms import normalize
from retinanet.utils import UserError, progress


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    device: torch.device,
    precision: torch.dtype,
    epoch: int,
    clip_norm: float | None = None,
    accumulate: int = 1,
    after_step: Callable[[], None] | None = None,
    log_step: Callable[[dict[str, float]], None] | None = None,
    log_every: int = 20,
) -> dict[str, float]:
    """Train on every batch of `loader` once.

    Args:
        model: in training mode, gives class loss and box loss.
        loader: batches from `collater`, with a length.
        optimizer: stepped after every `accumulate` batches.
        schedule: stepped with it.
        device: where the model is.
        precision: of the network's arithmetic: torch.float32 or torch.bfloat16.
        epoch: for messages.
        clip_norm: limit of the gradient's norm.
        accumulate: batches whose gradients are averaged for one step.
        after_step: called after every optimizer step, such as an EMA's update.
        log_step: called every `log_every` batches with their mean losses, the rate and images/s.
        log_every: batches.

    Returns:
        The epoch's mean `class_loss`, `box_loss` and `loss`, and `images_per_second`.

    Raises:
        UserError: a loss is not finite; the message names epoch, step and images.
    """
    model.train()
    num_batches = len(loader)
    sums, recent, num_images, recent_images = torch.zeros(2), torch.zeros(2), 0, 0
    start = recent_start = time.perf_counter()
    bar = progress(loader, f"epoch {epoch}")
    for step, batch in enumerate(bar):
        images = normalize(batch["img"].to(device, non_blocking=True))
        annotations = batch["annot"].to(device, non_blocking=True)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            losses = torch.cat(model([images, annotations]))  # class loss, box loss
        values = losses.detach().cpu()
        if not values.isfinite().all():
            raise UserError(
                f"the loss is not finite (class {values[0]}, box {values[1]}) in epoch {epoch}, step {step}, images "
                f"{batch['index']}: lower the learning rate (--lr), or look at these images' boxes"
            )
        # The last step of an epoch may average over fewer batches than the others.
        first = step - step % accumulate
        (losses.sum() / min(accumulate, num_batches - first)).backward()
        if (step + 1) % accumulate == 0 or step + 1 == num_batches:
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if after_step is not None:
                after_step()

        sums, recent = sums + values, recent + values
        num_images, recent_images = num_images + len(images), recent_images + len(images)
        if (step + 1) % log_every == 0 or step + 1 == num_batches:
            class_loss, box_loss = (recent / (step % log_every + 1)).tolist()
            entry = {
                "epoch": epoch,
                "step": step + 1,
                "class_loss": class_loss,
                "box_loss": box_loss,
                "lr": optimizer.param_groups[0]["lr"],
                "images_per_second": recent_images / (time.perf_counter() - recent_start),
            }
            bar.set_postfix_str(
                f"class {class_loss:.3f}, box {box_loss:.3f}, lr {entry['lr']:.1e}, "
                f"{entry['images_per_second']:.1f} images/s"
            )
            if log_step is not None:
                log_step(entry)
            recent, recent_images, recent_start = torch.zeros(2), 0, time.perf_counter()
    class_loss, box_loss = (sums / max(1, num_batches)).tolist()
    return {
        "class_loss": class_loss,
        "box_loss": box_loss,
        "loss": class_loss + box_loss,
        "images_per_second": num_images / (time.perf_counter() - start),
    }


def detect(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    device: torch.device,
    precision: torch.dtype = torch.float32,
    **limits: float | None,
) -> dict[int, Detections]:
    """Run a detector over a data set.

    Args:
        model: has `detect`; it is in the mode that it was in afterwards.
        loader: batches from `collater`, of samples from Resizer.
        device: where the model is.
        precision: of the network's arithmetic.
        **limits: arguments of `RetinaNet.detect`: `score_threshold`, `nms_threshold`, `top_k`, `max_detections`.

    Returns:
        For the index of each sample its Detections, on the CPU, boxes in pixels of the original image.
    """
    was_training = model.training
    model.eval()
    found = {}
    try:
        for batch in progress(loader, "detecting"):
            images = normalize(batch["img"].to(device, non_blocking=True))
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                detections = model.detect(images, image_sizes=batch["size"], **limits)
            for index, scale, (scores, labels, boxes) in zip(batch["index"], batch["scale"], detections, strict=True):
                found[index] = Detections(scores.cpu(), labels.cpu(), boxes.cpu() / scale)
    finally:
        model.train(was_training)
    return found
