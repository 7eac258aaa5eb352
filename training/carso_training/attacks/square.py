"""Square attack (Andriushchenko et al., 2020, arXiv:1912.00049) and random search. They need scores, not gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from carso_training.attacks.attack import Method, Scores
from carso_training.attacks.linf import ball

QUERIES = 5000
FIRST_SHARE = 0.8  # of the pixels that the first squares cover
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries of 10 000: the schedule of the paper


def margin(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the label's score less the highest of the others [B]: below zero for misclassified images."""
    own = scores.gather(1, labels[:, None]).squeeze(1)
    return own - scores.scatter(1, labels[:, None], -torch.inf).amax(dim=1)


@torch.no_grad()
def square(
    scores: Scores,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    queries: int = QUERIES,
    goal: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Lower the margin by squares of one colour at random places, kept where they help.

    `images` are [B, channels, height, width]; each gets a square of its own per query. An image is left alone once its
    margin is at most `goal`, in units of scores. `queries`: after the first look; the sizes of the squares follow the
    paper's schedule for 10 000, stretched. `scores` should not be random: an accepted square may otherwise be luck. See
    `attack.Making` for the other arguments.
    """
    count, channels, height, width = images.shape
    device = images.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device, dtype=images.dtype)

    def signs(*shape: int) -> Tensor:
        return 2.0 * (uniform(*shape) < 0.5) - 1

    low, high = ball(images, eps)
    best = torch.clamp(images + eps * signs(count, channels, 1, width), low, high)  # stripes
    lowest = margin(scores(best), labels)
    eps = torch.as_tensor(eps, dtype=images.dtype, device=device)
    rows, columns = torch.arange(height, device=device).view(1, 1, -1, 1), torch.arange(width, device=device)
    for query in range(queries):
        left = (lowest > goal).nonzero().squeeze(1)
        if not len(left):
            break
        side = _side(query * 10_000 // queries, height=height, width=width)
        top = (uniform(len(left), 1, 1, 1) * (height - side + 1)).long()
        start = (uniform(len(left), 1, 1, 1) * (width - side + 1)).long()
        inside = (rows >= top) & (rows < top + side) & (columns >= start) & (columns < start + side)
        colour = 2 * (eps[left] if eps.dim() else eps) * signs(len(left), channels, 1, 1)
        tried = torch.clamp(best[left] + inside * colour, low[left], high[left])
        found = margin(scores(tried), labels[left])
        better = found < lowest[left]
        best[left[better]], lowest[left[better]] = tried[better], found[better]
    return best


@torch.no_grad()
def random_search(
    scores: Scores,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    queries: int = QUERIES,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the best of random corners of the ball: a check that needs no cleverness. See `attack.Making`."""
    low, high = ball(images, eps)
    best, lowest = images.clone(), margin(scores(images), labels)
    for _ in range(queries):
        coin = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        tried = torch.where(coin < 0.5, low, high)
        found = margin(scores(tried), labels)
        better = found < lowest
        best[better], lowest[better] = tried[better], found[better]
    return best


def _side(query: int, *, height: int, width: int) -> int:
    """The side of the squares of one query of 10 000."""
    share = FIRST_SHARE / 2 ** sum(query > after for after in HALVED_AFTER)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


SQUARE = Method(name="square", norm="linf", make=square, settings={"queries": QUERIES})
RANDOM_SEARCH = Method(name="random-search", norm="linf", make=random_search, settings={"queries": QUERIES})
