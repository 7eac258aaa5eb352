"""Auto-PGD on the cross-entropy and on the targeted DLR loss (Croce & Hein, 2020, arXiv:2003.01690).

`ascend` is the attack; `apgd_ce` and `apgd_t` are its two forms in AutoAttack. A function of scores may be random: a
system that votes gives scores averaged over fresh latents at every call. The attack is then on their expectation
(Athalye et al., 2018, arXiv:1802.00420). `tests/test_auto_attack.py` compares the two forms with the authors' own code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from carso_training.attacks.attack import Method, Scores
from carso_training.attacks.linf import ball

Loss = Callable[[Tensor, Tensor], Tensor]
"""Scores [B, classes] and labels [B] -> what the attack raises, for each image [B]."""

STEPS = 100
TARGETS = 9
MOMENTUM = 0.75
PROGRESS = 0.75  # a step is halved if at most this share of the steps since the last look raised the loss


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy [B] of logits or log-probabilities."""
    return F.cross_entropy(scores, labels, reduction="none")


def negative_log(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return minus the labels' log-probabilities [B]: of a mean over votes, the votes' mean cross-entropy."""
    return -log_probabilities.gather(1, labels[:, None]).squeeze(1)


def targeted_dlr(targets: Tensor) -> Loss:
    """Return the targeted difference-of-logits-ratio loss towards `targets` [B].

    It is -(z_label - z_target) / (z_1st - (z_3rd + z_4th) / 2), with the scores in descending order. Shifting or
    scaling all scores of an image does not change it. With fewer than four classes the last stands for the missing.
    """

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        ordered = scores.sort(dim=1, descending=True).values
        third, fourth = (ordered[:, min(place, ordered.shape[1] - 1)] for place in (2, 3))
        gap = (scores.gather(1, labels[:, None]) - scores.gather(1, targets[:, None])).squeeze(1)
        return -gap / (ordered[:, 0] - (third + fourth) / 2 + 1e-12)

    return loss


def likeliest_others(scores: Tensor, labels: Tensor, *, count: int) -> Tensor:
    """Return the classes of highest score but the label, best first: [B, min(count, classes - 1)] int64."""
    others = scores.scatter(1, labels[:, None], -torch.inf)
    return others.topk(min(count, scores.shape[1] - 1), dim=1).indices


def ascend(
    scores: Scores,
    images: Tensor,
    labels: Tensor,
    *,
    loss: Loss,
    eps: float | Tensor,
    steps: int = STEPS,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Raise `loss` in the L-infinity ball, with a step size of its own for every image.

    Returns, for each image, the misclassified iterate of highest loss, else the iterate of highest loss: [B, ...] in
    [0, 1], within `eps` of `images` and detached. The step starts at 2 eps. It is halved at checkpoints at which the
    loss has not risen often enough, or neither the best loss nor the step has changed since the last one; the search
    then resumes from the best point. Takes `steps` + 1 gradients.

    `start` [B, ...]: where to begin, such as the result of another attack, which the result then is not worse than;
    None: at random in the ball. See `attack.Making` for the other arguments.
    """
    each = (-1, *[1] * (images.dim() - 1))  # the shape of one number per image
    low, high = ball(images, eps)
    if start is None:
        noise = 2 * torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype) - 1
        start = images + eps * noise / noise.abs().flatten(1).amax(dim=1).view(each)
    x = torch.clamp(start, low, high)
    before = x.clone()
    values, gradient, wrong = _look(scores, x, labels, loss)
    best, best_gradient, best_value = x.clone(), gradient.clone(), values.clone()
    found, found_value, found_wrong = x.clone(), values.clone(), wrong.clone()

    step = 2 * eps * torch.ones_like(values).view(each)
    period = max(int(0.22 * steps), 1)
    shortest, shorter_by = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    taken, rises = 0, torch.zeros_like(values)  # since the last checkpoint
    value_at_checkpoint, halved = best_value.clone(), torch.ones_like(wrong)
    for index in range(steps):
        moved = torch.clamp(x + step * gradient.sign(), low, high)
        share = MOMENTUM if index else 1.0
        before, x = x, torch.clamp(x + share * (moved - x) + (1 - share) * (x - before), low, high)
        last = values
        values, gradient, wrong = _look(scores, x, labels, loss)

        better = values > best_value
        best[better], best_gradient[better], best_value[better] = x[better], gradient[better], values[better]
        better = (wrong & ~found_wrong) | ((wrong == found_wrong) & (values > found_value))
        found[better], found_value[better], found_wrong[better] = x[better], values[better], wrong[better]

        taken, rises = taken + 1, rises + (values > last)
        if taken == period:
            stuck = ~halved & (value_at_checkpoint >= best_value)
            halved = (rises <= PROGRESS * period) | stuck
            step = torch.where(halved.view(each), step / 2, step)
            x = torch.where(halved.view(each), best, x)
            gradient = torch.where(halved.view(each), best_gradient, gradient)
            value_at_checkpoint, rises, taken = best_value.clone(), torch.zeros_like(rises), 0
            period = max(period - shorter_by, shortest)
    return found


def apgd_ce(
    scores: Scores,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    steps: int = STEPS,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Raise the cross-entropy, from one random start; see `attack.Making` for the arguments."""
    return ascend(scores, images, labels, loss=cross_entropy, eps=eps, steps=steps, generator=generator)


def apgd_t(
    scores: Scores,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    steps: int = STEPS,
    targets: int = TARGETS,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Aim at the `targets` likeliest other classes in turn, until an image is misclassified.

    Targets are ranked by the scores of the images themselves. See `attack.Making` for the other arguments.
    """
    with torch.no_grad():
        goals = likeliest_others(scores(images), labels, count=targets)
    result, eps = images.clone(), torch.as_tensor(eps, device=images.device)
    left = torch.arange(len(images), device=images.device)
    for goal in goals.T:
        radius = eps[left] if eps.dim() else eps
        loss = targeted_dlr(goal[left])
        result[left] = ascend(
            scores, images[left], labels[left], loss=loss, eps=radius, steps=steps, generator=generator
        )
        with torch.no_grad():
            left = left[scores(result[left]).argmax(dim=1) == labels[left]]
        if not len(left):
            break
    return result


def _look(scores: Scores, x: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss [B], its gradient [B, ...], and which images are misclassified [B] bool."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        found = scores(x)
        values = loss(found, labels)
        (gradient,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), gradient, found.detach().argmax(dim=1) != labels


APGD_CE = Method(
    name="apgd-ce",
    norm="linf",
    make=apgd_ce,
    settings={"steps": STEPS},
    in_training=lambda eps, steps: {"steps": steps},
)
APGD_T = Method(
    name="apgd-t",
    norm="linf",
    make=apgd_t,
    settings={"steps": STEPS, "targets": TARGETS},
    in_training=lambda eps, steps: {"steps": steps},
)
