"""The settings of a training run: what the flags of train.py say, with nothing left to decide."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from retinanet.process import PRECISIONS, choose_precision, get_world_size
from retinanet.training.recipes import RECIPES


@dataclass(frozen=True)
class Settings:
    """How a run trains. All values are plain types, so that args.json and checkpoints can carry them.

    Attributes:
        out_dir: folder of the run.
        resume: `auto`, the path of a checkpoint, or None.
        recipe: a name in RECIPES.
        epochs: passes over the training set.
        batch_size: images a batch, of each process.
        accumulate: batches averaged for one optimizer step.
        global_batch: images of an optimizer step, over all processes.
        lr: peak learning rate.
        clip_norm: limit of the gradient's norm; None for no limit.
        ema: decay of the averaged weights; None for no average.
        early_stop: validations without a better AP after which the run stops; None for no limit.
        seed: of weights, order and augmentation.
        min_side: pixels of the resized short side.
        max_side: limit of the resized long side, pixels.
        precision: fp32 or bf16.
        checkpoint_every: a number, and `steps` or `minutes`.
        val_every: epochs from one validation to the next.
        log_every: optimizer steps from one entry of log.jsonl to the next.
        tensorboard: write the log for TensorBoard as well.
        other: the other flags, of data, model and augmentation.
    """

    out_dir: str
    resume: str | None
    recipe: str
    epochs: int
    batch_size: int
    accumulate: int
    global_batch: int
    lr: float
    clip_norm: float | None
    ema: float | None
    early_stop: int | None
    seed: int
    min_side: int
    max_side: int
    precision: str
    checkpoint_every: tuple[int, str]
    val_every: int
    log_every: int
    tensorboard: bool
    other: dict[str, Any]

    @classmethod
    def resolve(cls, flags: Mapping[str, Any], device: torch.device) -> "Settings":
        """Derive from the recipe, the device and the number of processes what the flags leave open.

        Args:
            flags: name -> value, with None or `auto` where they leave it open.
            device: that the run computes on.
        """
        recipe = RECIPES[flags["recipe"]]
        dtype = choose_precision(flags["precision"], device)
        global_batch = flags["batch_size"] * flags["accumulate"] * get_world_size()
        values = {
            **flags,
            "global_batch": global_batch,
            "lr": flags["lr"] or recipe.lr * global_batch / recipe.reference_batch,
            "clip_norm": flags["clip_norm"] or recipe.clip_norm,
            "precision": next(name for name, value in PRECISIONS.items() if value == dtype),
        }
        own = {field.name: values.pop(field.name) for field in fields(cls) if field.name != "other"}
        return cls(**own, other=values)

    @property
    def dtype(self) -> torch.dtype:
        """What `precision` means."""
        return PRECISIONS[self.precision]

    def as_dict(self) -> dict[str, Any]:
        """Every flag's name -> its value."""
        own = asdict(self)
        return own.pop("other") | own
