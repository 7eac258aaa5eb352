"""The attacks that protocols are made of, each as a trial of a campaign."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from carso_training.attacks.apgd import Loss, ascend, cross_entropy, likeliest_others, targeted_dlr
from carso_training.attacks.attack import Scores
from carso_training.attacks.pgd import pgd
from carso_training.attacks.square import random_search, square
from carso_training.robustness.campaign import Trial

View = Callable[[torch.Generator], Scores]
"""What the attacker differentiates or queries. The generator, on the images' device, decides what is random in it."""

Note = int | float | str


def untargeted(name: str, view: View, *, eps: float, steps: int, loss: Loss = cross_entropy, **settings: Note) -> Trial:
    """Return APGD on the cross-entropy. `settings` are noted beside its own."""

    def make(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return ascend(view(generator), images, labels, loss=loss, eps=eps, steps=steps, generator=generator)

    return Trial(name=name, make=make, settings={"steps": steps, **settings})


def targeted(name: str, view: View, *, rank: int, eps: float, steps: int, **settings: Note) -> Trial:
    """Return APGD on the targeted DLR loss, towards one of the other classes: rank 0 is an image's likeliest."""

    def make(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        scores = view(generator)
        with torch.no_grad():
            goal = likeliest_others(scores(images), labels, count=rank + 1)[:, -1]
        return ascend(scores, images, labels, loss=targeted_dlr(goal), eps=eps, steps=steps, generator=generator)

    return Trial(name=name, make=make, settings={"steps": steps, "target": rank + 1, **settings})


def descent(name: str, view: View, *, eps: float, steps: int, **settings: Note) -> Trial:
    """Return PGD on the cross-entropy, from one random start, with steps of 2.5 eps / steps."""
    step_size = 2.5 * eps / steps

    def make(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        scores = view(generator)
        return pgd(scores, images, labels, eps=eps, steps=steps, step_size=step_size, generator=generator)

    return Trial(name=name, make=make, settings={"steps": steps, "step_size": round(step_size, 6), **settings})


def squares(name: str, view: View, *, eps: float, queries: int, goal: float = 0.0, **settings: Note) -> Trial:
    """Return Square. `goal`: the margin at which it leaves an image."""

    def make(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return square(view(generator), images, labels, eps=eps, queries=queries, goal=goal, generator=generator)

    return Trial(name=name, make=make, settings={"queries": queries, "goal": goal, **settings})


def squares_and_gradients(
    name: str, answers: View, view: View, *, eps: float, queries: int, steps: int, goal: float = 0.0, **settings: Note
) -> Trial:
    """Return Square on `answers`, and then APGD on the cross-entropy of `view` from where Square ended.

    Square leaves the local maxima in which gradients end; gradients then go where squares are too coarse. On the
    published classifier at eps 0.30 the two together break more than each alone, and more than twenty restarts of APGD
    (`tests/test_protocols.py`).
    """
    first = squares(name, answers, eps=eps, queries=queries, goal=goal)

    def make(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        start = first.make(images, labels, generator)
        scores = view(generator)
        return ascend(
            scores, images, labels, loss=cross_entropy, eps=eps, steps=steps, start=start, generator=generator
        )

    return Trial(name=name, make=make, settings={**first.settings, "steps": steps, **settings})


def search(name: str, view: View, *, eps: float, queries: int, **settings: Note) -> Trial:
    """Return a random search over the corners of the ball."""

    def make(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return random_search(view(generator), images, labels, eps=eps, queries=queries, generator=generator)

    return Trial(name=name, make=make, settings={"queries": queries, **settings})
