"""The settings of a training run: what the flags of train.py say, with nothing left to decide."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from retinanet.process import PRECISIONS, choose_precision, get_world_size
from retinanet.training.checkpoint import LIMITS
from retinanet.training.recipes import RECIPES


@dataclass(frozen=True)
class Settings:
    """How a run trains: one value for each flag of train.py, whose help says what it means.

    All are plain types. `global_batch` is the number of images of an optimizer step, over all processes; `other` holds
    the flags of data, model, augmentation and machine.
    """

    out_dir: str
    resume: str | None
    recipe: str
    epochs: int
    batch_size: int
    accumulate: int
    global_batch: int
    lr: float
    backbone_lr: float
    freeze_stages: int
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
        """Derive from the recipe, the device and the number of processes what flags of None or `auto` leave open."""
        recipe = RECIPES[flags["recipe"]]
        dtype, stages = choose_precision(flags["precision"], device), flags["freeze_stages"]
        global_batch = flags["batch_size"] * flags["accumulate"] * get_world_size()
        values = {
            **flags,
            "global_batch": global_batch,
            "lr": flags["lr"] or recipe.lr * global_batch / recipe.reference_batch,
            "freeze_stages": recipe.freeze_stages if stages is None else stages,
            "clip_norm": flags["clip_norm"] or recipe.clip_norm,
            "precision": next(name for name, value in PRECISIONS.items() if value == dtype),
        }
        own = {field.name: values.pop(field.name) for field in fields(cls) if field.name != "other"}
        return cls(**own, other=values)

    @property
    def dtype(self) -> torch.dtype:
        """What `precision` means."""
        return PRECISIONS[self.precision]

    @property
    def limits(self) -> dict[str, float]:
        """The limits of detection."""
        return LIMITS | {name: self.other[name] for name in LIMITS if name in self.other}

    def as_dict(self) -> dict[str, Any]:
        """Every flag's name -> its value."""
        own = asdict(self)
        return own.pop("other") | own
