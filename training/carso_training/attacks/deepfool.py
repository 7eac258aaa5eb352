"""L-infinity DeepFool (Moosavi-Dezfooli et al., 2016, arXiv:1511.04599)."""

from __future__ import annotations

import torch
from torch import Tensor

from carso_training.attacks.attack import Method, Scores
from carso_training.attacks.linf import project

STEPS = 50
OVERSHOOT = 0.02


def deepfool(
    scores: Scores,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = STEPS,
    overshoot: float = OVERSHOOT,
) -> Tensor:
    """Return images just over the decision boundary, in [0, 1] but not projected to any eps-ball.

    Each step goes to the nearest face of the linearised decision region; an image stops once it is misclassified.
    Use `project` for the eps-ball: one run serves every eps. Needs float32: the result lies on the decision
    boundary, where coarser rounding alone undoes it.
    """
    result = images.clone()
    active = torch.arange(len(images), device=images.device)  # rows still classified correctly
    start = scores(images).argsort(dim=1, descending=True)  # the predicted class, then the candidates
    total = torch.zeros_like(images)
    for _ in range(steps):
        active = active[scores(result[active]).argmax(dim=1) == labels[active]]
        if not len(active):
            break
        order = start[active]
        gaps, gradients = _gaps_to_other_classes(scores, result[active], order)
        distances = gaps.abs() / (gradients.flatten(2).abs().sum(dim=2) + 1e-8)
        nearest = distances.argmin(dim=1)
        rows = torch.arange(len(active), device=images.device)
        # 1e-4 steps over the boundary where the linearisation is exact
        length = (distances[rows, nearest] + 1e-4).view(-1, *[1] * (images.dim() - 1))
        total[active] += length * gradients[rows, nearest].sign()
        result[active] = (images[active] + (1 + overshoot) * total[active]).clamp(0.0, 1.0)
    return result


def within(
    scores: Scores,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    steps: int = STEPS,
    overshoot: float = OVERSHOOT,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return DeepFool's images projected to the eps-ball. Nothing is random; see `attack.Making` for the arguments."""
    return project(deepfool(scores, images, labels, steps=steps, overshoot=overshoot), images, eps)


def _gaps_to_other_classes(scores: Scores, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Score of each other class less that of the first in `order`, [B, K-1], and its gradients, [B, K-1, ...]."""
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        ranked = scores(images).gather(1, order)
        gaps = ranked[:, 1:] - ranked[:, :1]
        one_hot = torch.eye(gaps.shape[1], device=images.device)[:, None, :].expand(-1, len(images), -1)
        (gradients,) = torch.autograd.grad(gaps, images, grad_outputs=one_hot, is_grads_batched=True)
    return gaps.detach(), gradients.transpose(0, 1)


DEEPFOOL = Method(name="deepfool", norm="linf", make=within, settings={"steps": STEPS, "overshoot": OVERSHOOT})
