"""What L-infinity attacks have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from carso_training.attacks.attack import Scores


def project(attacked: Tensor, images: Tensor, eps: float | Tensor) -> Tensor:
    """Return the nearest images (in every L-p norm) that lie both in the eps-ball of `images` and in [0, 1]."""
    return torch.clamp(attacked, (images - eps).clamp_(min=0.0), (images + eps).clamp_(max=1.0))


def loss_gradient(scores: Scores, images: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the cross-entropy, summed over the batch, with respect to `images`: the same shape."""
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        loss = F.cross_entropy(scores(images), labels, reduction="sum")
        return torch.autograd.grad(loss, images)[0]
