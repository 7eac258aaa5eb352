"""The adaptive protocol, for all of CARSO against an attacker who knows all of it but the latents.

The count of the votes has no gradient, so three stand-ins take its place (`networks.system.Average`), each an
expectation over fresh latents. Every candidate is judged by the pipeline that ships, over fresh latents that no attack
has seen (`judges.RobustPath`), and not by the attacked copy.
"""

from __future__ import annotations

from typing import Protocol

import torch

from carso_training.attacks.apgd import cross_entropy, negative_log
from carso_training.attacks.attack import Scores
from carso_training.networks.system import AVERAGES, Average, System
from carso_training.robustness import trials
from carso_training.robustness.campaign import Trial
from carso_training.robustness.effort import Effort

TARGETED: tuple[Average, ...] = ("logits", "softmax")  # the targeted loss of log-probabilities is that of the logits
GOAL = -0.5  # the margin at which attacks without gradients leave an image: a close vote may fall the other way again
TRANSFERRED_TARGETS = 3  # of targeted attacks on something else than what is judged


class Voting(Protocol):
    """A defence that votes, as its attacker sees it: `System` is one, and so is each control (`controls.py`)."""

    classes: int

    def fresh(self, average: Average, *, votes: int, generator: torch.Generator) -> Scores:
        """Return the mean over `votes` of what is drawn afresh at every call."""

    def held(self, average: Average, *, votes: int, generator: torch.Generator) -> Scores:
        """Return the mean over `votes` that stay the same at every call and for every image."""


def adaptive_trials(system: System, *, eps: float, effort: Effort, surrogate: System | None = None) -> list[Trial]:
    """Return the attacks on a system: transfer first, because it is cheap, then `attacks_on_a_vote`.

    Each is made on the images that withstood the others. `surrogate`: another system, trained independently, whose
    images are tried on this one too.
    """
    steps, votes = effort.steps, effort.latents
    ranks = range(min(effort.targets, system.classes - 1, TRANSFERRED_TARGETS))

    def first_pass(generator: object) -> Scores:
        return system.classifier_scores()

    made = [
        trials.untargeted("transfer-apgd-ce", first_pass, eps=eps, steps=steps),
        *(
            trials.targeted(f"transfer-apgd-t-{rank + 1}", first_pass, rank=rank, eps=eps, steps=steps)
            for rank in ranks
        ),
    ]
    if surrogate is not None:
        made += [
            untargeted(surrogate, "logits", eps=eps, steps=steps, votes=votes, prefix="surrogate-"),
            *(
                targeted(surrogate, "logits", rank, eps=eps, steps=steps, votes=votes, prefix="surrogate-")
                for rank in ranks
            ),
        ]
    return [*made, *attacks_on_a_vote(system, eps=eps, effort=effort)]


def attacks_on_a_vote(defence: Voting, *, eps: float, effort: Effort) -> list[Trial]:
    """Return the attacks through all of a defence that votes, those that break most for their cost first."""
    steps, votes, held = effort.steps, effort.latents, effort.latents_of_square
    ranks = range(min(effort.targets, defence.classes - 1))

    def answers(generator: torch.Generator) -> Scores:
        return defence.held("softmax", votes=held, generator=generator)

    first, *others = AVERAGES
    return [
        untargeted(defence, first, eps=eps, steps=steps, votes=votes),
        *(targeted(defence, TARGETED[0], rank, eps=eps, steps=steps, votes=votes) for rank in ranks),
        trials.squares_and_gradients(
            "square-apgd-logits",
            answers,
            _through(defence, "logits", votes=votes),
            eps=eps,
            queries=effort.queries,
            steps=steps,
            goal=GOAL,
            latents=votes,
            latents_of_square=held,
        ),
        *(untargeted(defence, average, eps=eps, steps=steps, votes=votes) for average in others),
        *(
            targeted(defence, average, rank, eps=eps, steps=steps, votes=votes)
            for average in TARGETED[1:]
            for rank in ranks
        ),
        trials.descent(
            "pgd-softmax", _through(defence, "softmax", votes=votes), eps=eps, steps=effort.pgd_steps, latents=votes
        ),
        trials.search("random-search", answers, eps=eps, queries=effort.queries // 5, latents=held),
    ]


def untargeted(defence: Voting, average: Average, *, eps: float, steps: int, votes: int, prefix: str = "") -> Trial:
    """Return APGD on the cross-entropy through all of a defence.

    Of ``log-probabilities`` it is the mean of the votes' own cross-entropies, the loss of EoT-PGD.
    """
    return trials.untargeted(
        f"{prefix}apgd-ce-{average}",
        _through(defence, average, votes=votes),
        eps=eps,
        steps=steps,
        loss=negative_log if average == "log-probabilities" else cross_entropy,
        latents=votes,
    )


def targeted(
    defence: Voting, average: Average, rank: int, *, eps: float, steps: int, votes: int, prefix: str = ""
) -> Trial:
    """Return APGD on the targeted DLR loss through all of a defence, towards an image's other class number `rank`."""
    return trials.targeted(
        f"{prefix}apgd-t-{average}-{rank + 1}",
        _through(defence, average, votes=votes),
        rank=rank,
        eps=eps,
        steps=steps,
        latents=votes,
    )


def _through(defence: Voting, average: Average, *, votes: int) -> trials.View:
    return lambda generator: defence.fresh(average, votes=votes, generator=generator)
