"""The settings of a training run, for train.py and `retinanet.train`: their checks, and the values that they imply."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
from torchvision.transforms import Compose

from retinanet.anchors import Anchors
from retinanet.data.tiles import BACKGROUND, MAX_OVERLAP, OVERLAP, SIDES, RandomTile, Tiling
from retinanet.data.transforms import FLIPS, Augmenter, ColourJitter, LargeScaleJitter, RandomCrop, Resizer
from retinanet.errors import UserError, shown, suggestion
from retinanet.model import ARCHITECTURES
from retinanet.process import PRECISIONS, choose_precision, get_world_size
from retinanet.training.checkpoint import LIMITS
from retinanet.training.recipes import RECIPES
from retinanet.training.weights import COCO_DEPTH, V2_DEPTHS

# The ranges of settings: beyond them, memory runs out or arithmetic fails without a message.
BOUNDS = {
    **dict.fromkeys(("min_side", "max_side", "jitter"), (1, 16_384)),  # pixels
    **dict.fromkeys(("batch_size", "accumulate"), (1, 65_536)),
    **dict.fromkeys(("epochs", "early_stop", "val_every", "log_every", "limit"), (1, 10**7)),
    **dict.fromkeys(("max_detections", "top_k"), (1, 10**6)),
    **dict.fromkeys(("ema", "random_crop", "colour_jitter", "tile_background"), (0, 1)),
    **dict.fromkeys(("score_threshold", "nms_threshold", "iou_threshold", "min_precision"), (0, 1)),
    "tile": SIDES,  # pixels
    "tile_overlap": (0, MAX_OVERLAP),
    "workers": (0, 256),
    "seed": (0, 2**63 - 1),
    "lr": (1e-12, 1000),
    "backbone_lr": (1e-6, 1000),
    "clip_norm": (1e-9, 10**9),
    "balance": (1e-6, 1),
    "anchor_sizes": (0.5, 16_384),  # pixels
    **dict.fromkeys(("anchor_scales", "anchor_ratios", "scale_jitter"), (0.01, 100)),
}
AUGMENTATIONS = ("flip", "rotate90", "scale_jitter", "jitter", "random_crop", "colour_jitter")
CHOICES = {
    "depth": [*ARCHITECTURES],
    "recipe": [*RECIPES],
    "freeze_stages": [*range(5)],
    "flip": [*FLIPS],
    "precision": ["auto", *PRECISIONS],
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run trains: a field for each flag of train.py, with its default; the flag's help says what it means.

    All are plain types. `resolve` fills in the values that the recipe or the machine decides. `other` holds flags that
    are not about training, such as those that name the data.
    """

    depth: int = 50
    weights: str | None = None
    anchor_scales: list[float] | None = None
    anchor_ratios: list[float] | None = None
    anchor_sizes: list[float] | None = None
    recipe: str = "original"
    epochs: int | None = None
    batch_size: int = 2
    accumulate: int = 1
    lr: float | None = None
    backbone_lr: float = 1.0
    freeze_stages: int | None = None
    clip_norm: float | None = None
    ema: float | None = None
    early_stop: int | None = None
    balance: float | None = None
    seed: int = 0
    min_side: int | None = None
    max_side: int | None = None
    tile: int | None = None
    tile_overlap: float = OVERLAP
    tile_background: float = BACKGROUND
    flip: str = "horizontal"
    rotate90: bool = False
    scale_jitter: list[float] | None = None
    jitter: list[int] | None = None
    random_crop: float | None = None
    colour_jitter: float | None = None
    score_threshold: float = LIMITS["score_threshold"]
    nms_threshold: float = LIMITS["nms_threshold"]
    top_k: int = LIMITS["top_k"]
    max_detections: int = LIMITS["max_detections"]
    device: str = "auto"
    precision: str = "auto"
    workers: int = 2
    strict: bool = False
    out_dir: str = "runs/train"
    resume: str | None = None
    checkpoint_every: tuple[int, str] | str = "10m"
    val_every: int = 1
    log_every: int = 20
    tensorboard: bool = False
    other: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The default of each setting; None for those that `resolve` fills."""
        return {one.name: one.default for one in fields(cls) if one.name != "other"}

    @classmethod
    def resolve(cls, flags: Mapping[str, Any], device: torch.device) -> "Settings":
        """Replace flags of None or `auto` by what the recipe, the device and the number of processes imply."""
        own, other = cls.defaults(), {}
        for name, value in flags.items():
            (own if name in own else other)[name] = value
        settings = cls(**follow_recipe(own), other=other)
        recipe, dtype = RECIPES[settings.recipe], choose_precision(settings.precision, device)
        return replace(
            settings,
            lr=settings.lr or recipe.lr * settings.global_batch / recipe.reference_batch,
            clip_norm=settings.clip_norm or recipe.clip_norm,
            precision=next(name for name, value in PRECISIONS.items() if value == dtype),
        )

    @property
    def global_batch(self) -> int:
        """Number of images of an optimizer step, over all processes."""
        return self.batch_size * self.accumulate * get_world_size()

    @property
    def dtype(self) -> torch.dtype:
        """The type that `precision` names."""
        return PRECISIONS[self.precision]

    @property
    def tiling(self) -> Tiling | None:
        """The tiles that `tile` and `tile_overlap` describe; None for none."""
        return Tiling(self.tile, self.tile_overlap) if self.tile else None

    @property
    def sides(self) -> tuple[int, int]:
        """Short side and limit of the long side, pixels, of the network's images; with tiles, the side of a tile."""
        return (self.tile, self.tile) if self.tile else (self.min_side, self.max_side)

    @property
    def limits(self) -> dict[str, float]:
        """The limits of detection."""
        return {name: getattr(self, name) for name in LIMITS}

    def as_dict(self) -> dict[str, Any]:
        """Every flag's name -> its value, and `global_batch`."""
        own = asdict(self)
        return own.pop("other") | own | {"global_batch": self.global_batch}


def follow_recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with the recipe's weights, epochs, sizes, frozen stages, jitter and average where they are None."""
    filled, recipe = dict(settings), RECIPES[settings["recipe"]]
    if filled["weights"] is None and recipe.weights == "imagenet_v2" and filled["depth"] not in V2_DEPTHS:
        filled["weights"] = "imagenet"
    for name in ("weights", "epochs", "min_side", "max_side", "freeze_stages", "ema"):
        if filled[name] is None:
            filled[name] = getattr(recipe, name)
    if recipe.jitter and not (filled["jitter"] or filled["scale_jitter"] or filled["tile"]):
        filled["jitter"] = [round(recipe.jitter * filled["min_side"]), filled["min_side"]]
    filled["ema"] = filled["ema"] or None  # 0 means no average, whatever the recipe says
    return filled


def augmentation_errors(settings: Mapping[str, Any]) -> list[str]:
    """A message for each setting of augmentation that contradicts another; `max_side` may still be unknown, None."""
    jitter, scales, max_side = settings["jitter"], settings["scale_jitter"], settings["max_side"]
    errors = []
    if jitter and not jitter[0] <= jitter[1] <= (max_side or jitter[1]):
        end = f", up to --max_side {max_side}" if max_side else ""
        errors.append(f"--jitter {jitter[0]} {jitter[1]} must be in rising order{end}")
    if scales and scales[0] > scales[1]:
        errors.append(f"--scale_jitter {scales[0]:g} {scales[1]:g} must be in rising order")
    if jitter and scales:
        errors.append("--jitter and --scale_jitter both choose the size: give only one of them")
    return errors


def contradictions(settings: Mapping[str, Any], has_val_set: bool) -> list[str]:
    """A message for each setting that contradicts another one."""
    filled = follow_recipe(settings)
    min_side, max_side = filled["min_side"], filled["max_side"]
    errors = augmentation_errors({**settings, "max_side": max_side})
    if max_side < min_side:
        errors.append(f"--max_side {max_side} is below --min_side {min_side}")
    changed = {name for name, value in Settings.defaults().items() if settings[name] != value}
    if settings["tile"]:
        given = sorted(changed & {"min_side", "max_side"})
        errors += [f"--tile uses images at full resolution, so it excludes --{name}" for name in given]
    else:
        errors += [f"--{name} needs --tile" for name in sorted(changed & {"tile_overlap", "tile_background"})]
    if filled["weights"] == "coco" and settings["depth"] != COCO_DEPTH:
        errors.append(f"--weights coco is a ResNet-{COCO_DEPTH}, not --depth {settings['depth']}")
    if settings["early_stop"] and not has_val_set:
        errors.append("--early_stop needs a validation set")
    if settings["ema"] == 1:
        errors.append("--ema 1 would never change the weights")
    return errors


def check_settings(given: Mapping[str, Any], has_val_set: bool) -> dict[str, Any]:
    """The arguments of `retinanet.train` -> all settings, as the flags of train.py would set them.

    A UserError lists all errors.
    """
    defaults = Settings.defaults()
    hints = {name: hint for name, hint in get_type_hints(Settings).items() if name in defaults}
    settings = as_flags({**defaults, **given}, hints)
    if errors := contradictions(settings, has_val_set):
        raise UserError("; ".join(errors))
    return settings


def as_flags(given: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Convert arguments, by their type hints, to the plain values that flags of the same names would have.

    A UserError lists all that are unknown, of the wrong type or out of bounds.
    """
    values, errors = {}, []
    for name, value in given.items():
        if name not in hints:
            errors.append(f"there is no setting {shown(name)}{suggestion(name, hints)}")
            continue
        try:
            values[name] = _as_flag(name, value, get_args(hints[name]) or (hints[name],))
        except ValueError as error:
            errors.append(f"{name} {error}")
    if errors:
        raise UserError("; ".join(errors))
    return values


def parse_interval(value: Any) -> tuple[int, str]:
    """`500` or 500 for optimizer steps, `10m` for minutes -> the number and its unit; anything else is a ValueError."""
    found = re.fullmatch("([0-9]{1,18}(?:e[0-9])?)(m?)", str(value))
    if not found or not float(found[1]):
        raise ValueError(f"must be a number of steps, such as 500, or minutes, such as 10m, not {shown(value)}")
    return int(float(found[1])), "minutes" if found[2] else "steps"


def _as_flag(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    """Convert a setting to what its flag would be: of the first of `kinds`, or None; a ValueError if it cannot be."""
    kind, choices = kinds[0], CHOICES.get(name)
    if name == "checkpoint_every":
        return parse_interval(value)
    if value is None and NoneType in kinds:
        return None
    if get_args(kind):  # a list
        number = 2 if name in ("jitter", "scale_jitter") else None
        values = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
        if not values or (number and len(values) != number):
            raise ValueError(f"must be {number or 'one or more'} numbers, not {shown(value)}")
        return [_as_flag(name, one, get_args(kind)) for one in values]
    if kind in (int, float):
        low, high = BOUNDS.get(name, (0, float("inf")))
        if not isinstance(value, Real) or isinstance(value, bool) or (kind is int and value != value // 1):
            raise ValueError(f"must be a {'whole ' * (kind is int)}number, not {shown(value)}")
        if not choices and not low <= value <= high:
            raise ValueError(f"must be from {low:g} to {high:,}, not {value}")
    elif not isinstance(value, str | Path | torch.device if kind is str else kind) or value == "":
        raise ValueError(f"must be {'True or False' if kind is bool else 'a string'}, not {shown(value)}")
    if choices and value not in choices:
        near = suggestion(str(value), map(str, choices))
        raise ValueError(f"must be one of {', '.join(map(str, choices))}, not {shown(value)}{near}")
    return kind(value)


def anchors_from_settings(settings: Any) -> Anchors:
    """The anchors that settings or flags describe, by default the paper's; a UserError if they are not valid."""
    try:
        return Anchors(sizes=settings.anchor_sizes, ratios=settings.anchor_ratios, scales=settings.anchor_scales)
    except ValueError as error:
        raise UserError(f"--anchor_sizes, --anchor_scales, --anchor_ratios: {error}") from error


def training_transform(settings: Any) -> Callable[[dict], dict]:
    """The transform of training samples, from settings or flags."""
    steps, sides = [], (settings.min_side, settings.max_side)
    if settings.tile:
        steps.append(RandomTile(settings.tile, settings.tile_background))
        sides = (settings.tile, settings.tile)
    if settings.random_crop is not None:
        steps.append(RandomCrop(settings.random_crop))
    if settings.colour_jitter is not None:
        steps.append(ColourJitter(settings.colour_jitter))
    steps.append(Augmenter(settings.flip, settings.rotate90))
    if settings.scale_jitter:
        steps.append(LargeScaleJitter(*settings.scale_jitter, *sides))
    elif settings.jitter:
        steps.append(Resizer(settings.jitter, settings.max_side))
    else:
        steps.append(Resizer(*sides, enlarge=not settings.tile))
    return Compose(steps)
