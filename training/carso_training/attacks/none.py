"""No attack: clean images."""

from __future__ import annotations

import torch
from torch import Tensor

from carso_training.attacks.attack import Method, Scores


def leave(
    scores: Scores,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the images themselves."""
    return images


NONE = Method(name="none", norm="linf", make=leave)
