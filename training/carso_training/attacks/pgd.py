"""Projected gradient descent (Madry et al., 2018, arXiv:1706.06083)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from carso_training.attacks.attack import Method, Scores
from carso_training.attacks.linf import climb, random_start

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
    return climb(
        lambda x: F.cross_entropy(scores(x), labels, reduction="sum"),
        random_start(images, eps, generator=generator),
        images,
        eps=eps,
        steps=steps,
        step_size=step_size,
    )


PGD = Method(
    name="pgd",
    norm="linf",
    make=pgd,
    settings={"steps": STEPS, "step_size": STEP_SIZE},
    in_training=lambda eps, steps: {"steps": steps, "step_size": 2.5 * eps / steps},
)
