"""The training loop: one epoch, in one process or in many."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import nn

from retinanet.data.loader import explained
from retinanet.data.transforms import normalize
from retinanet.process import autocast, get_world_size
from retinanet.signals import undisturbed
from retinanet.training.accounting import Meter, Progress
from retinanet.training.finite import check_losses, clip_gradient, send_losses
from retinanet.training.recipes import Schedule

C5_STRIDE = 32  # pixels


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    schedule: Schedule,
    device: torch.device,
    precision: torch.dtype,
    progress: Progress,
    clip_norm: float | None = None,
    accumulate: int = 1,
    stop_signal: Callable[[], int] = lambda: 0,
    after_step: Callable[[int, Callable[[], dict[str, float]]], None] = lambda signum, check_norm: None,
    log_step: Callable[[dict[str, float]], None] = lambda entry: None,
    log_every: int = 20,
    outlook: Callable[[], str] = lambda: "",
) -> dict[str, float]:
    """Train on every batch of `loader` once.

    Args:
        model: on `device`; returns class loss [1] and box loss [1]; may be wrapped in DistributedDataParallel.
        loader: batches from `collater`; its length is that of the whole epoch, its batches start at `progress.step`.
        optimizer: stepped, as is `schedule`, after every `accumulate` batches, whose gradients are averaged.
        scaler: of the loss, enabled if `precision` is torch.float16; it skips steps whose gradient overflows.
        precision: of the network's arithmetic: torch.float32, torch.bfloat16 or torch.float16.
        progress: where to start; kept up to date.
        clip_norm: limit of the gradient's norm.
        stop_signal: called before every step; returns the number of the signal that has arrived, or 0.
        after_step: called after every optimizer step, to update an EMA, save a checkpoint or stop, with the largest
            such number of all ranks, and a function that checks that the step's gradient was finite, to be called
            before anything is saved.
        log_step: called every `log_every` steps with their mean losses, the learning rate, the gradient's norm and
            images/s; the progress bar shows these and the text about the whole run that `outlook` returns.

    Returns:
        The epoch's mean `class_loss`, `box_loss` and `loss`, over all ranks, and `images_per_second`.

    Raises:
        NotFiniteError: a loss or the gradient is not finite; the message names epoch, step and images.
        UserError: memory runs out, or an image cannot be read.
    """
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
    meter = Meter(progress, -(-len(loader) // accumulate), log_every, log_step, outlook)
    check_norm, on_gpu = None, device.type == "cuda"  # CUDA copies from pinned memory without blocking the host
    with explained(loader, precision) as seen:
        for step, group in zip(meter.bar, _groups(loader, accumulate, seen), strict=False):
            signum, values = stop_signal(), []
            for batch in group:
                is_last = batch is group[-1]
                images = normalize(batch["img"].to(device, non_blocking=on_gpu))
                annotations = batch["annot"].to(device, non_blocking=on_gpu)
                # A batch with one value per channel on C5 has no variance, so it uses the running statistics, as
                # frozen stages always do.
                for norm in norms:
                    norm.train(norm.weight.requires_grad and images[:, 0].numel() > C5_STRIDE**2)
                # Ranks average their gradients once a step, in the backward pass of its last batch.
                with nullcontext() if is_last or get_world_size() == 1 else model.no_sync():
                    with autocast(device, precision):
                        losses = torch.cat(model([images, annotations]))  # [2]: class loss, box loss
                    values.append(losses.detach())
                    if is_last:  # sent before the backward pass, so that they arrive while the device computes it
                        receive_losses = send_losses(values, signum)
                    scaler.scale(losses.sum() / len(group)).backward()
            losses, signum = receive_losses()  # of all ranks
            if check_norm:  # the norm of the previous step has arrived by now, so nothing has to wait
                check_norm()
            where = f"in epoch {progress.epoch}, step {step + 1}"
            check_losses(losses, where, group)
            scaler.unscale_(optimizer)
            check_norm = clip_gradient(weights, clip_norm, scaler, where, group)
            lr = optimizer.param_groups[0]["lr"]
            with undisturbed():  # weights, schedule, average and checkpoint must change together
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                schedule.step()
                meter.count(losses, group, lr, check_norm)
                after_step(signum, check_norm)
    return meter.statistics()


def _groups(loader: Iterable[dict[str, Any]], accumulate: int, seen: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """The batches of each optimizer step; `seen` is the one from `explained`."""
    batches = iter(loader)
    while True:
        seen.clear()
        group = list(islice(batches, accumulate))
        assert group, "the loader has fewer batches than its length says"
        seen["shape"] = tuple(max(sizes) for sizes in zip(*(batch["img"].shape for batch in group), strict=True))
        yield group
