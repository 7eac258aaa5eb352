"""L-infinity, untargeted attacks on images in [0, 1], as the published table defines them.

Each attack takes a classifier *in eval mode* that maps images to class scores (logits or log-softmax: the
cross-entropy of either is the same), clean images [B, ...], and true labels [B], and returns images of the
same shape inside [0, 1] and inside the eps-ball of the clean ones. `tests/test_attacks.py` holds each of them
against foolbox on the same classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Scores = Callable[[Tensor], Tensor]
Kind = Literal["clean", "fgsm", "pgd", "deepfool"]

PGD_STEPS = 40  # the published attack: 40 steps of 0.01
PGD_STEP_SIZE = 0.01
DEEPFOOL_STEPS = 50
DEEPFOOL_OVERSHOOT = 0.02


@dataclass(frozen=True)
class Attack:
    """One row of the published table."""

    kind: Kind
    eps: float = 0.0

    @property
    def name(self) -> str:
        """The row's name, such as ``pgd-0.30``; also a safe file name."""
        return self.kind if self.kind == "clean" else f"{self.kind}-{self.eps:.2f}"


CLEAN = Attack("clean")
FORESEEN = tuple(Attack(kind, eps) for kind in ("fgsm", "pgd") for eps in (0.15, 0.30))
PUBLISHED = (CLEAN, *(Attack(kind, eps) for kind in ("fgsm", "pgd", "deepfool") for eps in (0.15, 0.30, 0.50)))


@contextmanager
def attacked_in_eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Hold a model in eval mode with frozen parameters while attacks are made on it.

    BatchNorm in train mode would change the very model under attack; gradients of parameters would be waste.
    """
    was_training, required = model.training, [p.requires_grad for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield model
    finally:
        for parameter, flag in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(flag)
        model.train(was_training)


def project(attacked: Tensor, images: Tensor, eps: float | Tensor) -> Tensor:
    """The nearest images (in every L-p norm) that lie both in the eps-ball of `images` and in [0, 1]."""
    return torch.clamp(attacked, (images - eps).clamp_(min=0.0), (images + eps).clamp_(max=1.0))


def fgsm(scores: Scores, images: Tensor, labels: Tensor, *, eps: float | Tensor) -> Tensor:
    """Fast gradient sign method (Goodfellow et al., 2015): x + eps * sign(gradient)."""
    return project(images + eps * _loss_gradient(scores, images, labels).sign(), images, eps)


def pgd(
    scores: Scores,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    steps: int = PGD_STEPS,
    step_size: float | Tensor = PGD_STEP_SIZE,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient descent (Madry et al., 2018) from a uniform random start in the eps-ball.

    `eps` and `step_size` may be tensors that broadcast against `images`, so that one call makes attacks of
    several strengths. The random start comes from `generator`, on the device of `images`.
    """
    noise = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    low, high = (images - eps).clamp_(min=0.0), (images + eps).clamp_(max=1.0)
    attacked = torch.clamp(images + eps * (2 * noise - 1), low, high)
    for _ in range(steps):
        attacked = torch.clamp(attacked + step_size * _loss_gradient(scores, attacked, labels).sign(), low, high)
    return attacked


def deepfool(
    scores: Scores,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = DEEPFOOL_STEPS,
    overshoot: float = DEEPFOOL_OVERSHOOT,
) -> Tensor:
    """L-infinity DeepFool (Moosavi-Dezfooli et al., 2016), not yet projected to any eps-ball.

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


def attack_images(
    scores: Scores, attack: Attack, images: Tensor, labels: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """The images of one row of the published table."""
    match attack.kind:
        case "clean":
            return images
        case "fgsm":
            return fgsm(scores, images, labels, eps=attack.eps)
        case "pgd":
            return pgd(scores, images, labels, eps=attack.eps, generator=generator)
        case "deepfool":
            return project(deepfool(scores, images, labels), images, attack.eps)


def _loss_gradient(scores: Scores, images: Tensor, labels: Tensor) -> Tensor:
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        loss = F.cross_entropy(scores(images), labels, reduction="sum")
        return torch.autograd.grad(loss, images)[0]


def _gaps_to_other_classes(scores: Scores, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Score of each other class less that of the first in `order`, [B, K-1], and its gradients, [B, K-1, ...]."""
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        ranked = scores(images).gather(1, order)
        gaps = ranked[:, 1:] - ranked[:, :1]
        one_hot = torch.eye(gaps.shape[1], device=images.device)[:, None, :].expand(-1, len(images), -1)
        (gradients,) = torch.autograd.grad(gaps, images, grad_outputs=one_hot, is_grads_batched=True)
    return gaps.detach(), gradients.transpose(0, 1)
