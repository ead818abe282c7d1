"""Recipes: optimizer, learning rate and its schedule, initial weights, and image size of a training run.

`original` is the recipe of yhenon/pytorch-retinanet, `paper` that of RetinaNet's authors, and `modern` the best that is
published for the unmodified network; all need ImageNet weights. `scratch` is this library's, for random weights.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import get_ema_multi_avg_fn


@dataclass(frozen=True)
class Recipe:
    """The defaults of a training run, which flags can override."""

    optimizer: str  # `adam`, `sgd` (momentum 0.9) or `adamw`
    lr: float  # for a global batch of `reference_batch` images; it scales with the batch
    reference_batch: int
    weight_decay: float  # as the optimizer defines it
    # `plateau` (a tenth when the training loss stops falling), `steps` (a tenth at 2/3 and again at 8/9 of the run) or
    # `one_cycle` (up to `lr`, then down along a cosine).
    schedule: str
    warmup_steps: int  # for `steps`: the rate rises linearly from a third
    clip_norm: float | None  # limit of the gradient's norm
    train_bn: bool  # BatchNorm takes its statistics from the batches; otherwise they stay frozen
    fix_affine: bool  # BatchNorm's scale and shift are not trained
    freeze_stages: int  # number of the backbone's stages, conv1 being the first, that are not trained
    best_match_iou: float | None  # the matching rule, see `FocalLoss`
    double_bias: bool  # train biases at twice the rate and without weight decay
    decay_vectors: bool = True  # biases and BatchNorm's scales decay as other weights do
    weights: str = "imagenet"  # what the run starts from
    epochs: int = 100
    min_side: int = 608  # pixels of the resized short side
    max_side: int = 1024  # limit of the resized long side, pixels
    jitter: float | None = None  # short sides are drawn from this share of `min_side` to all of it
    ema: float | None = None  # decay of the moving average of the weights


# fmt: off
RECIPES = {
    # train.py of yhenon/pytorch-retinanet.
    "original": Recipe(
        optimizer="adam", lr=1e-5, reference_batch=2, weight_decay=0.0, schedule="plateau", warmup_steps=0,
        clip_norm=0.1, train_bn=False, fix_affine=False, freeze_stages=0, best_match_iou=None, double_bias=False,
    ),
    # Section 4.1, "Optimization" (90k steps, a tenth at 60k and 80k); what the paper does not say is from Detectron.
    "paper": Recipe(
        optimizer="sgd", lr=0.01, reference_batch=16, weight_decay=1e-4, schedule="steps", warmup_steps=500,
        clip_norm=None, train_bn=False, fix_affine=True, freeze_stages=2, best_match_iou=0.4, double_bias=True,
    ),
    # Random weights need normalised activations (He, Girshick and Dollar, "Rethinking ImageNet Pre-training", 2018) and
    # a step size per parameter; the numbers were found on small data sets. Every object keeps its best anchor, however
    # small their overlap, as in torchvision, because small data sets often have small objects. Gradients are clipped
    # to norm 1, which gives AP 0.852 on shapes; norm 10 gives 0.821 (README, "Accuracy").
    "scratch": Recipe(
        optimizer="adamw", lr=5e-4, reference_batch=4, weight_decay=0.05, schedule="one_cycle", warmup_steps=0,
        clip_norm=1.0, train_bn=True, fix_affine=False, freeze_stages=0, best_match_iou=0.0, double_bias=False,
        weights="none",
    ),
    # AdamW, decay, 12 epochs and frozen layers: mmdetection, configs/resnet_strikes_back, 39.0 AP on COCO; SGD gives
    # 36.5 ("ResNet strikes back", Wightman et al., 2021). Scale jitter: the paper's section 5.2; mmdetection's ms_3x
    # gains from it, too. Averaging the weights has been usual since EfficientDet (0.9998, Tan et al., 2020).
    "modern": Recipe(
        optimizer="adamw", lr=1e-4, reference_batch=16, weight_decay=0.05, schedule="steps", warmup_steps=1000,
        clip_norm=None, train_bn=False, fix_affine=False, freeze_stages=2, best_match_iou=0.0, double_bias=False,
        decay_vectors=False, weights="imagenet_v2", epochs=12, min_side=800, max_side=1333, jitter=0.6, ema=0.9998,
    ),
}
# fmt: on

BACKBONE = ("conv1.", "bn1.", "layer")  # prefixes of the names of the backbone's weights

# The state that an optimizer keeps for each weight, in tensors of the weight's shape.
MOMENTS = {"sgd": ["momentum_buffer"], "adam": ["exp_avg", "exp_avg_sq"], "adamw": ["exp_avg", "exp_avg_sq"]}


def make_optimizer(model: nn.Module, recipe: Recipe, lr: float, backbone_lr: float = 1.0) -> torch.optim.Optimizer:
    """The recipe's optimizer over the weights of `model` that need a gradient, at their peak learning rates.

    These are `lr`, multiplied by `backbone_lr` for the backbone; if the backbone has its own groups, they come last.
    """
    weights = {}  # (is in the backbone's groups, has no decay) -> weights
    for name, weight in model.named_parameters():
        no_decay = (recipe.double_bias and name.endswith("bias")) or (not recipe.decay_vectors and weight.dim() == 1)
        if weight.requires_grad:
            weights.setdefault((backbone_lr != 1 and name.startswith(BACKBONE), no_decay), []).append(weight)
    groups = []
    for of_backbone, no_decay in sorted(weights):
        rate = lr * (backbone_lr if of_backbone else 1) * (2 if no_decay and recipe.double_bias else 1)
        decay = 0.0 if no_decay else recipe.weight_decay
        groups.append({"params": weights[of_backbone, no_decay], "lr": rate, "weight_decay": decay})
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=0.9, fused=True)
        # torch 2.14 leaves the buffers uninitialised if a GradScaler skips the first step. Zeros give the same steps.
        for weight in (weight for group in groups for weight in group["params"]):
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        return optimizer
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, fused=True)


class Schedule:
    """Changes the learning rate after every step or epoch, as `recipe` says; `optimizer` holds the peak rates."""

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe, total_steps: int):
        self.by_epoch = recipe.schedule == "plateau"
        if recipe.schedule == "plateau":
            self.scheduler = ReduceLROnPlateau(optimizer, patience=3)
        elif recipe.schedule == "one_cycle":
            peaks = [group["lr"] for group in optimizer.param_groups]
            # The rise takes at least one step; with five steps in all, torch would divide by zero.
            rise = max(0.2, 2 / (total_steps + 1))
            self.scheduler = OneCycleLR(optimizer, peaks, total_steps + 1, pct_start=rise, cycle_momentum=False)
        else:
            warmup = min(recipe.warmup_steps, total_steps // 10)

            def factor(step: int) -> float:
                warm = min(1.0, 1 / 3 + 2 / 3 * step / max(1, warmup))
                return warm * 0.1 ** sum(step >= share * total_steps for share in (2 / 3, 8 / 9))

            self.scheduler = LambdaLR(optimizer, factor)

    def step(self) -> None:
        """Call after every optimizer step."""
        if not self.by_epoch:
            self.scheduler.step()

    def end_epoch(self, training_loss: float) -> None:
        """Call after every epoch, with its mean training loss."""
        if self.by_epoch:
            self.scheduler.step(training_loss)


class EMA:
    """A copy of a model whose weights are an exponential moving average of the model's weights over the steps.

    It often detects better than the model of any single step (Tarvainen and Valpola, "Mean teachers are better role
    models", 2017). In the first steps it follows faster, so that random weights are soon forgotten. `model` is the
    copy, in evaluation mode; BatchNorm's statistics are those of the last step.
    """

    # Not torch's AveragedModel: it counts steps on the GPU, and a rising decay would have to wait for the count.

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Call after every optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(list(self.model.parameters()), list(model.parameters()), self.steps)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
