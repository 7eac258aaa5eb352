"""RayS (Chen & Gu, 2020, arXiv:2006.12792): an L-infinity attack that sees nothing but labels.

It looks for the corner of the ball in whose direction the decision boundary is nearest: signs are turned in blocks of
pixels, halves first, then quarters, and so on, and a turn is kept if it brings the boundary nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from carso_training.attacks.linf import project

Decisions = Callable[[Tensor], Tensor]
"""Images [B, *shape] in [0, 1] -> labels [B]: one query for each image. They may change from call to call. Below
zero: the image was refused, which fools nobody."""

START = 0.5  # the farthest look, in units of pixels
PRECISION = 1e-3  # of the distance to the boundary, in units of pixels


@torch.no_grad()
def rays(decisions: Decisions, images: Tensor, labels: Tensor, *, eps: float, queries: int) -> Tensor:
    """Return, for each image, the corner of the eps-ball in the best direction found: [B, *shape] in [0, 1].

    Each image takes at most `queries` queries. It takes no more once the boundary is found within `eps`.
    """
    searches = [_search(image, eps=eps) for image in images]
    asked = {place: next(search) for place, search in enumerate(searches)}
    best = torch.ones_like(images)
    for _ in range(queries):
        if not asked:
            break
        places = list(asked)
        said = decisions(torch.stack([*asked.values()]))
        wrong = (said != labels[places]) & (said >= 0)
        for place, fooled in zip(places, wrong.tolist(), strict=True):
            try:
                asked[place] = searches[place].send(fooled)
            except StopIteration as found:
                best[place] = found.value
                del asked[place]
    for place in asked:  # out of queries: the best direction so far
        try:
            searches[place].throw(_OutOfQueriesError)
        except StopIteration as found:
            best[place] = found.value
    return project(images + eps * best, images, eps)


class _OutOfQueriesError(Exception):
    """Ends a search."""


def _search(image: Tensor, *, eps: float) -> Generator[Tensor, bool, Tensor]:
    """Yield images to ask about, take whether each was misclassified, and return the direction: signs like `image`."""
    signs, radius = torch.ones(image.numel(), dtype=image.dtype, device=image.device), START

    def at(way: Tensor, distance: float) -> Tensor:
        return torch.clamp(image + distance * way.view_as(image), 0.0, 1.0)

    try:
        tried = signs
        parts, part = 1, -1  # the first look is at the direction itself
        while True:
            if (yield at(tried, radius)):
                low, high = 0.0, radius
                while high - low > PRECISION and high > eps:
                    middle = (low + high) / 2
                    low, high = (low, middle) if (yield at(tried, middle)) else (middle, high)
                signs, radius = tried, high
                if radius <= eps:
                    return signs.view_as(image)
            part += 1
            if part == parts:
                parts, part = min(2 * parts, image.numel()), 0
            start, end = part * image.numel() // parts, (part + 1) * image.numel() // parts
            tried = signs.clone()
            tried[start:end] *= -1
    except _OutOfQueriesError:
        return signs.view_as(image)
