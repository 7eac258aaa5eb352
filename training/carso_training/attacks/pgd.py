"""Projected gradient descent (Madry et al., 2018, arXiv:1706.06083)."""

from __future__ import annotations

import torch
from torch import Tensor

from carso_training.attacks.attack import Method, Scores
from carso_training.attacks.linf import loss_gradient

STEPS = 40  # the published attack: 40 steps of 0.01
STEP_SIZE = 0.01


def pgd(
    scores: Scores,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    steps: int = STEPS,
    step_size: float | Tensor = STEP_SIZE,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Descend from a uniform random start in the eps-ball; see `attack.Making` for the arguments.

    `step_size`, in units of pixels, may be a tensor that broadcasts against `images`, as `eps` may.
    """
    noise = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    low, high = (images - eps).clamp_(min=0.0), (images + eps).clamp_(max=1.0)
    attacked = torch.clamp(images + eps * (2 * noise - 1), low, high)
    for _ in range(steps):
        attacked = torch.clamp(attacked + step_size * loss_gradient(scores, attacked, labels).sign(), low, high)
    return attacked


PGD = Method(
    name="pgd",
    norm="linf",
    make=pgd,
    settings={"steps": STEPS, "step_size": STEP_SIZE},
    in_training=lambda eps, steps: {"steps": steps, "step_size": 2.5 * eps / steps},
)
