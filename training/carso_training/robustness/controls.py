"""Controls: simpler defences, measured as CARSO is, which tell what its parts are worth.

- one zero latent: CARSO without chance, whose one vote the attacker knows
- noised votes: the first pass votes over images with Gaussian noise, and nothing is purified
- smoothing: the same at the cost of CARSO's votes, with the noise that does best on validation images: the empirical
  side of randomised smoothing (Cohen et al., 2019, arXiv:1902.02918), under L-infinity attacks and without certificates
- fewer and more votes: every image that the adaptive attacks made, judged again by elections of another size
- int8: the same images, judged again by the votes in int8
- another bundle's classifier, such as a plain one of the whole system's size

Each is attacked through all of itself (`adaptive.attacks_on_a_vote`), and judged on the bundle's graphs.
"""

from __future__ import annotations

import numpy as np
import torch
from carso.inference.sessions import Sessions
from carso.inference.vote import StoppingRule
from torch import Tensor

from carso_training.attacks.attack import Scores
from carso_training.networks.system import Average, System, averaged
from carso_training.robustness.judges import Counting

VOTES = (1, 10, 100, 1500)  # of the elections that judge the adaptive attacks' images again
NOISE = 0.25  # the standard deviation of noised votes, in units of pixels
NOISES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)  # smoothing chooses among these, on validation images
VALIDATION_IMAGES = 200
GROUP = 32  # images whose noised copies are in memory at once


class Noised:
    """A first pass that votes over noised images, as its attacker sees it; see `adaptive.Voting`."""

    def __init__(self, system: System, *, noise: float) -> None:
        """`noise`: the standard deviation, in units of pixels. Noised images are not clipped."""
        self._system, self._noise, self.classes = system, noise, system.classes

    def fresh(self, average: Average, *, votes: int, generator: torch.Generator) -> Scores:
        """Return the mean over fresh noise at every call."""

        def function(images: Tensor) -> Tensor:
            shape = (votes, *images.shape)
            return self._mean(images, torch.randn(shape, generator=generator, device=images.device), average)

        return function

    def held(self, average: Average, *, votes: int, generator: torch.Generator) -> Scores:
        """Return the mean over noise that stays the same, and is the same for every image."""
        noise: list[Tensor] = []

        def function(images: Tensor) -> Tensor:
            if not noise:
                shape = (votes, 1, *images.shape[1:])
                noise.append(torch.randn(shape, generator=generator, device=images.device))
            return self._mean(images, noise[0], average)

        return function

    def _mean(self, images: Tensor, noise: Tensor, average: Average) -> Tensor:
        noised = images + self._noise * noise.to(images)
        raw, (scores, _) = self._system.first_pass(noised.flatten(0, 1))
        shape = noised.shape[:2]
        return averaged(raw.unflatten(0, shape), scores.unflatten(0, shape), average=average)


class Fixed:
    """CARSO with latents that never change, as its attacker sees it; see `adaptive.Voting`."""

    def __init__(self, system: System, latents: Tensor) -> None:
        """`latents` [K, latent]: the votes, the same for every image."""
        self._system, self._latents, self.classes = system, latents, system.classes

    def fresh(self, average: Average, *, votes: int, generator: torch.Generator) -> Scores:
        """Return the mean over the fixed latents, whatever `votes` says."""
        count = len(self._latents)
        return self._system.scores(
            average, votes=count, latents=lambda rows: self._latents.repeat_interleave(rows // count, dim=0)
        )

    held = fresh


class FixedVote:
    """The judge of `Fixed`: a bundle's graphs, voting over the same latents for every image."""

    def __init__(self, sessions: Sessions, latents: np.ndarray, *, classes: int) -> None:
        """`latents` [K, latent] float32."""
        self._sessions, self._latents, self._classes = sessions, latents, classes

    def __call__(self, images: Tensor, labels: Tensor, rows: Tensor, trial: int) -> Tensor:
        """Judge images; see `judges.Judge`."""
        codes = self._sessions.first_pass(images.cpu().numpy()).codes
        index = np.repeat(np.arange(len(codes)), len(self._latents))
        votes = self._sessions.vote(codes, index, np.tile(self._latents, (len(codes), 1)))
        tally = np.eye(self._classes, dtype=np.int64)[votes].reshape(len(codes), -1, self._classes).sum(axis=1)
        return torch.from_numpy(tally.argmax(axis=1)) == labels.cpu()


class NoisedVote:
    """The judge of `Noised`: the first pass of a bundle's graphs, voting over fresh noise as often as `counting` says.

    Counts end early by the service's own rule. Noise depends on the seed, the trial, the draw and the image's row.
    """

    def __init__(self, sessions: Sessions, *, noise: float, classes: int, counting: Counting, seed: int) -> None:
        """`noise`: see `Noised`."""
        self._sessions, self._noise, self._counting, self._seed = sessions, noise, counting, seed
        self._rule = StoppingRule(samples=counting.samples, classes=classes, risk=counting.risk)

    def __call__(self, images: Tensor, labels: Tensor, rows: Tensor, trial: int) -> Tensor:
        """Judge images; see `judges.Judge`. An image that loses one draw is not asked again."""
        pixels, wanted = images.cpu().numpy(), labels.cpu().numpy()
        right = np.ones(len(pixels), bool)
        for draw in range(self._counting.draws):
            part = trial * self._counting.draws + draw
            for group in np.array_split(np.flatnonzero(right), max(1, int(right.sum()) // GROUP)):
                if len(group):
                    chances = [np.random.default_rng((self._seed, part, row)) for row in rows[group].tolist()]
                    right[group] = self._elected(pixels[group], chances) == wanted[group]
        return torch.from_numpy(right)

    def _elected(self, pixels: np.ndarray, chances: list[np.random.Generator]) -> np.ndarray:
        """Return the class that each image elects [n] int64."""
        expected = self._classes(pixels)
        tallies = np.zeros((len(pixels), self._rule.classes), np.int64)
        open_ones = list(range(len(pixels)))
        while open_ones:
            ballots = [self._rule.next_ballot(**_state(tallies[place], expected[place])) for place in open_ones]
            noised = np.concatenate(
                [
                    pixels[place]
                    + self._noise * chances[place].standard_normal((ballot, *pixels.shape[1:]), np.float32)
                    for place, ballot in zip(open_ones, ballots, strict=True)
                ]
            )
            np.add.at(tallies, (np.repeat(open_ones, ballots), self._classes(noised)), 1)
            open_ones = [
                place for place in open_ones if self._rule.ended_by(**_state(tallies[place], expected[place])) is None
            ]
        return tallies.argmax(axis=1)

    def _classes(self, pixels: np.ndarray) -> np.ndarray:
        return self._sessions.first_pass(pixels.astype(np.float32, copy=False)).probabilities.argmax(axis=1)


def _state(tally: np.ndarray, expected: int) -> dict[str, int | bool]:
    """The arguments of `StoppingRule`'s methods."""
    runner_up, leader = np.sort(tally)[-2:].tolist()
    return {
        "leader": leader,
        "runner_up": runner_up,
        "cast": int(tally.sum()),
        "expected": bool(tally[expected] == leader),
    }
