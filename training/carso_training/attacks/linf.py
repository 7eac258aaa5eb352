"""What L-infinity attacks have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from carso_training.attacks.attack import Scores


def ball(images: Tensor, eps: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest value of each pixel in the eps-ball of `images` and in [0, 1]."""
    return (images - eps).clamp_(min=0.0), (images + eps).clamp_(max=1.0)


def project(attacked: Tensor, images: Tensor, eps: float | Tensor) -> Tensor:
    """Return the nearest images (in every L-p norm) that lie both in the eps-ball of `images` and in [0, 1]."""
    return torch.clamp(attacked, *ball(images, eps))


def random_start(images: Tensor, eps: float | Tensor, *, generator: torch.Generator | None) -> Tensor:
    """Return a uniform draw from the eps-ball of `images`, clipped to [0, 1]. `generator` is on their device."""
    noise = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return project(images + eps * (2 * noise - 1), images, eps)


def climb(
    loss: Callable[[Tensor], Tensor],
    start: Tensor,
    images: Tensor,
    *,
    eps: float | Tensor,
    steps: int,
    step_size: float | Tensor,
) -> Tensor:
    """Raise `loss` by `steps` of size `step_size` along the sign of its gradient, within the eps-ball of `images`.

    `loss` takes images [B, *shape] and gives the sum over them, or a loss for each. `start` is within the ball. `eps`
    and `step_size` are numbers, or tensors that broadcast against `images`. Returns images of their shape, in [0, 1].
    """
    low, high = ball(images, eps)
    x = start
    for _ in range(steps):
        with torch.enable_grad():
            at = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(at).sum(), at)
        x = torch.clamp(x + step_size * gradient.sign(), low, high)
    return x


def loss_gradient(scores: Scores, images: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the cross-entropy, summed over the batch, with respect to `images`: the same shape."""
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        loss = F.cross_entropy(scores(images), labels, reduction="sum")
        return torch.autograd.grad(loss, images)[0]
