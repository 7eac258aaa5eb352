"""The fast gradient sign method (Goodfellow et al., 2015, arXiv:1412.6572)."""

from __future__ import annotations

import torch
from torch import Tensor

from carso_training.attacks.attack import Method, Scores
from carso_training.attacks.linf import loss_gradient, project


def fgsm(
    scores: Scores,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return x + eps * sign(gradient), clipped to [0, 1]. Nothing is random; see `attack.Making` for the arguments."""
    return project(images + eps * loss_gradient(scores, images, labels).sign(), images, eps)


FGSM = Method(name="fgsm", norm="linf", make=fgsm)
