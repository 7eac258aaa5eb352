"""Who decides whether an image withstood an attack: what ships, on the bundle's graphs, never the attacked copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from carso.inference.pipeline import Pipeline
from torch import Tensor

from carso_training.robustness.voting import robust_answers, vote_seeds

Judge = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Images [B, *shape] on any device, labels [B], their rows in the data set [B], and the number of the trial -> which of
them are classified correctly, [B] bool on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Counting:
    """How the votes of one judgement are counted."""

    samples: int  # votes at most
    draws: int  # elections per image, each with fresh latents: the image must win all of them
    risk: float = 1e-6  # that an early end of a count elects another class than all votes would


class FastPath:
    """The first pass of a bundle's pipeline."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._sessions = pipeline.sessions

    def __call__(self, images: Tensor, labels: Tensor, rows: Tensor, trial: int) -> Tensor:
        """Judge images; see `Judge`."""
        found = self._sessions.first_pass(images.cpu().numpy()).probabilities
        return torch.from_numpy(found.argmax(axis=1)) == labels.cpu()


class RobustPath:
    """A bundle's whole pipeline, voting several times over fresh latents.

    Latents depend on the seed, the trial, the draw and the image's row, so no attack has seen them, and no two images
    share them.
    """

    def __init__(self, pipeline: Pipeline, *, counting: Counting, seed: int, images: int) -> None:
        """`images`: how many there are in the data set that rows point into."""
        self._pipeline, self._counting, self._seed, self._images = pipeline, counting, seed, images

    def __call__(self, images: Tensor, labels: Tensor, rows: Tensor, trial: int) -> Tensor:
        """Judge images; see `Judge`. An image that loses one draw is not asked again."""
        pixels, wanted = images.cpu(), labels.cpu()
        right = torch.ones(len(images), dtype=torch.bool)
        for draw in range(self._counting.draws):
            asked = right.nonzero().squeeze(1)
            if not len(asked):
                break
            part = trial * self._counting.draws + draw
            found = robust_answers(
                self._pipeline,
                pixels[asked].numpy(),
                samples=self._counting.samples,
                risk=self._counting.risk,
                seeds=vote_seeds(self._images, seed=self._seed, part=part)[rows[asked].numpy()],
            )
            right[asked] = torch.from_numpy(found) == wanted[asked]
        return right
