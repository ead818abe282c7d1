"""Resuming a run: find the checkpoint, and check that its flags and its content fit the new run."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retinanet.data.classes import check_classes
from retinanet.data.dataset import DetectionDataset
from retinanet.errors import UserError, shown
from retinanet.process import from_main_process, log
from retinanet.training.checkpoint import check_weights, checked
from retinanet.training.recipes import MOMENTS, RECIPES
from retinanet.training.settings import Settings

# Flags that may change when a run is resumed. The batch may be divided differently, but `global_batch` may not change.
FREE_FLAGS = {
    *("resume", "out_dir", "device", "workers", "strict", "batch_size", "accumulate", "val_every", "log_every"),
    *("checkpoint_every", "early_stop", "tensorboard", "pixel_limit"),
    *("coco_path", "voc_path", "yolo_path", "csv_train", "csv_val", "csv_classes"),
}
# Flags of later versions: a run that was saved without them has their defaults.
LATER = ("balance", "flip", "rotate90", "scale_jitter", "tile", "tile_overlap", "tile_background", "pixel_range")
EVERY_RUN = {"recipe", "lr", "epochs", "seed", "global_batch"}  # settings that every saved run has
# What a scheduler changes while it runs; the rest of its state follows from the settings.
CHANGING = ("last_epoch", "_step_count", "_last_lr", "best", "num_bad_epochs", "cooldown_counter")
NOT_CONTINUED = "its training cannot be continued; start from its weights with --weights"


def find_checkpoint(settings: Settings) -> Path | None:
    """The checkpoint to resume, if any; the same on all ranks."""
    if settings.resume != "auto":
        return Path(settings.resume) if settings.resume else None
    path = Path(settings.out_dir) / "last.pt"
    if not path.exists() and (old := list(path.parent.glob("old_*/last.pt"))):
        newest = max(old, key=lambda path: path.stat().st_mtime)
        log.warning("warning: --resume auto finds no %s, so a new run starts; did you mean %s?", path, newest)
    return from_main_process(path if path.exists() else None)


def check_resume(path: Path, settings: Settings, content: dict[str, Any], train_set: DetectionDataset) -> None:
    """Raise a UserError that lists how `settings` and `train_set` differ from those of the run saved in `path`."""
    if "training" not in content:
        raise UserError(f"{path}: holds a model, but no training state; start from it with --weights {path}")
    check_classes(str(path), content["class_names"], train_set)
    recipe = RECIPES[settings.recipe]
    free = FREE_FLAGS | ({"epochs"} if recipe.schedule == "plateau" else set())
    names = {"global_batch": "batch_size x --accumulate x processes"}
    with checked(path, NOT_CONTINUED):
        before, now = content["training"]["args"], settings.as_dict()
        if missing := sorted(EVERY_RUN - before.keys()):
            raise ValueError(f"it lacks the flags {', '.join(missing)}")
        before = {name: Settings.defaults().get(name) for name in LATER} | before
        before = {**before, "clip_norm": before.get("clip_norm") or recipe.clip_norm}  # earlier versions saved the flag
        errors = [
            f"--{names.get(flag, flag)} is {now[flag]}, was {shown(before[flag])}"
            for flag in sorted(now.keys() & before.keys() - free)
            if now[flag] != before[flag]
        ]
        num_images = content["training"]["num_images"]
        if len(train_set) != num_images:
            errors.append(f"the training set has {len(train_set)} images, had {shown(num_images)}")
    if errors:
        advice = "Repeat the flags of that run, or start a new one with --weights"
        raise UserError(f"--resume {path}: {'; '.join(errors)}. {advice}")


def check_state(found: Any, own: dict, weights: list[Tensor], settings: Settings, steps_per_epoch: int) -> None:
    """Check that `found`, the `training` of a checkpoint, has the keys, types and shapes of a run's `own`, in range.

    The optimizer's state is compared with the `weights` that it belongs to. A difference raises ValueError,
    LookupError, TypeError or AttributeError.
    """
    moments, progress = found["optimizer"]["state"], found["progress"]
    is_start = progress["epoch"] == progress["step"] == 0  # the optimizer has no state yet
    if moments.keys() != {*range(len(weights))} and (moments or not is_start):
        raise ValueError("its optimizer has other weights")
    recipe = RECIPES[settings.recipe]
    count = {} if recipe.optimizer == "sgd" else {"step": torch.zeros(())}
    optimizer = {
        "state": {index: count | dict.fromkeys(MOMENTS[recipe.optimizer], weights[index]) for index in moments},
        "param_groups": [{"lr": 0.0} for _ in own["optimizer"]["param_groups"]],
    }
    schedule = {key: own["schedule"][key] for key in CHANGING if key in own["schedule"]}
    same = {key: own[key] for key in own.keys() - {"args", "num_images", "random"}}
    _check_like(found, same | {"optimizer": optimizer, "schedule": schedule}, "training")
    check_weights(found.get("weights", {}))
    epoch, step, scheduler = progress["epoch"], progress["step"], found["schedule"]
    steps = epoch * steps_per_epoch + step
    rates = [group["lr"] for group in found["optimizer"]["param_groups"]] + scheduler["_last_lr"]
    tensors = [moment[name] for moment in moments.values() for name in MOMENTS[recipe.optimizer]]
    in_range = {
        "progress": epoch >= 0 and 0 <= step <= steps_per_epoch,
        "sums": all(map(math.isfinite, [*progress["sums"], *progress["recent"]])),
        "best": -1 <= found["best"] <= 1,
        "counts": min(progress["recent"][2], found["stale"], found["log_size"], found.get("ema_steps", 0)) >= 0,
        "schedule": scheduler["last_epoch"] == (epoch if recipe.schedule == "plateau" else steps),
        "best of the schedule": scheduler.get("best", 0) > -math.inf,
        "counts of the schedule": min(scheduler.get(key, 0) for key in ("num_bad_epochs", "cooldown_counter")) >= 0,
        # Biases may have twice the rate, and rates may be rounded.
        "lr": all(0 <= rate <= 2.001 * settings.lr * max(1, settings.backbone_lr) for rate in rates),
        "scaler": 0 < found.get("scaler", {"scale": 1})["scale"] < math.inf,
        "numbers": all(tensor.isfinite().all() for tensor in tensors),
        "exp_avg_sq": all((moment["exp_avg_sq"] >= 0).all() for moment in moments.values() if "exp_avg_sq" in moment),
        "step": all(0 <= moment["step"] <= steps for moment in moments.values() if "step" in moment),
    }
    if wrong := [name for name, fits in in_range.items() if not fits]:
        raise ValueError(f"{', '.join(wrong)} out of range")


def _check_like(found: Any, own: Any, name: str) -> None:
    """Raise an error if `found` lacks a part of `own`, or a part has another type, shape or length."""
    if isinstance(own, Tensor):
        if not isinstance(found, Tensor) or (found.shape, found.dtype) != (own.shape, own.dtype):
            raise ValueError(f"{name} is not a tensor of shape {list(own.shape)}")
    elif type(found) is not type(own) and not (isinstance(own, dict) and isinstance(found, dict)):
        raise ValueError(f"{name} is not of type {type(own).__name__}")
    elif isinstance(own, dict):
        for key in own:
            _check_like(found[key], own[key], f"{name}.{key}")
    elif isinstance(own, list | tuple):
        if len(found) != len(own):
            raise ValueError(f"{name} does not have {len(own)} entries")
        for index, (one, other) in enumerate(zip(found, own, strict=True)):
            _check_like(one, other, f"{name}.{index}")
