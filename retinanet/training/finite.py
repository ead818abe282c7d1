"""Checks that losses and gradients are finite, without making a GPU wait for them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retinanet.errors import UserError
from retinanet.process import gather_tensors, get_rank


class NotFiniteError(UserError):
    """A loss or a gradient is not finite; `batches` are those of this process that caused it."""

    def __init__(self, message: str, batches: list[dict[str, Any]]):
        super().__init__(message)
        self.batches = batches


def _send(values: Tensor) -> Callable[[], Tensor]:
    """Send numbers to the CPU. Calling the result waits for them, but not for work that was queued after them."""
    if values.device.type != "cuda":
        here = values.cpu()
        return lambda: here
    here, arrived = values.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(values.device))

    def receive() -> Tensor:
        arrived.synchronize()
        return here

    return receive


def send_losses(values: list[Tensor], number: int) -> Callable[[], tuple[Tensor, int]]:
    """Send the losses of an optimizer step, class loss and box loss [2] of each batch, and a number to all ranks.

    Returns:
        A function that waits for the losses of all ranks, [ranks, batches, 2] on the CPU, and their largest `number`.
    """
    arrived = _send(gather_tensors(torch.cat([*values, values[0].new_full((1,), number)])))

    def receive() -> tuple[Tensor, int]:
        found = arrived()  # [ranks, 2 * batches + 1]
        return found[:, :-1].view(len(found), len(values), 2), int(found[:, -1].max())

    return receive


def check_losses(losses: Tensor, where: str, group: list[dict[str, Any]]) -> None:
    """Raise NotFiniteError on all ranks if one of `losses` [ranks, batches, 2] is not finite.

    The message says `where` (epoch and step), and names the images of `group`, this rank's batches.
    """
    finite = losses.isfinite().all(dim=2)  # [ranks, batches]
    if finite.all():
        return
    bad = [batch for batch, fine in zip(group, finite[get_rank()], strict=True) if not fine]
    rank, index = (~finite).nonzero()[0].tolist()
    class_loss, box_loss = losses[rank, index].tolist()
    whose = _names(bad) if bad else f"images of rank {rank}"
    raise NotFiniteError(
        f"the loss is not finite (class {class_loss}, box {box_loss}) {where}, {whose}: "
        "lower the learning rate (--lr), or check the boxes of these images",
        bad,
    )


def clip_gradient(
    weights: list[nn.Parameter],
    clip_norm: float | None,
    scaler: torch.amp.GradScaler,
    where: str,
    group: list[dict[str, Any]],
) -> Callable[[], dict[str, float]]:
    """Limit the norm of the gradient, which `scaler` has unscaled, to `clip_norm`.

    Returns:
        A function that waits for numbers for the log: `grad_norm`, before clipping, and `loss_scale` if there is one.
        It raises NotFiniteError if the norm is not finite, unless the loss was scaled up: then the scale was too large,
        and the scaler skips the step and halves the scale.
    """
    if clip_norm is None:
        norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    else:
        norm = nn.utils.clip_grad_norm_(weights, clip_norm)
    arrived = _send(torch.stack([norm, scaler.scale(torch.ones_like(norm))]))

    def check() -> dict[str, float]:
        norm, scale = arrived().tolist()
        if not math.isfinite(norm) and scale <= 1:
            raise NotFiniteError(
                f"the gradient's norm is not finite ({norm}) {where}, {_names(group)}: "
                "lower the learning rate (--lr), or clip the gradient (--clip_norm)",
                group,
            )
        numbers = {"grad_norm": norm} if math.isfinite(norm) else {}
        return numbers | ({"loss_scale": scale} if scaler.is_enabled() else {})

    return check


def _names(batches: list[dict[str, Any]]) -> str:
    return f"images {', '.join(str(index) for batch in batches for index in batch['index'])}"
