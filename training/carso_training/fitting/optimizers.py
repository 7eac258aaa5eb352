"""The optimizers that a schedule may name, each with its learning rate."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from carso_training.recipe import Schedule

FALLS, FALL = (0.70, 0.85), 0.2  # the shares of a training at which a rate in steps falls, and to how much of itself


def optimizers_of(model: nn.Module, schedule: Schedule) -> list[Optimizer]:
    """Return the optimizers of the parameters that are trained: those that require a gradient.

    Muon updates the weight matrices, scaled so that one learning rate suits it and AdamW, which updates all others.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {"lr": schedule.peak_lr, "weight_decay": schedule.weight_decay}
    if schedule.optimizer == "radam":
        return [torch.optim.RAdam(trained, decoupled_weight_decay=True, **settings)]
    if schedule.optimizer == "adamw":
        return [torch.optim.AdamW(trained, **settings)]
    matrices = [parameter for parameter in trained if parameter.dim() == 2]
    others = [parameter for parameter in trained if parameter.dim() != 2]
    muon = [torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings)] if matrices else []
    return [*muon, *([torch.optim.AdamW(others, **settings)] if others else [])]


def rate_of(optimizer: Optimizer, schedule: Schedule, *, steps: int) -> LRScheduler:
    """Return the learning rate of an optimizer over all `steps` of a training."""
    if schedule.rate == "steps":
        falls = [int(share * steps) for share in FALLS]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=falls, gamma=FALL)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=schedule.peak_lr, total_steps=steps, pct_start=schedule.warmup, cycle_momentum=False
    )
