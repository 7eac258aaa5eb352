"""The adaptive protocol, for all of CARSO against an attacker who knows all of it but the latents.

The count of the votes has no gradient, so three stand-ins take its place (`networks.system.Average`), each an
expectation over fresh latents. Every candidate is judged by the pipeline that ships, over fresh latents that no attack
has seen (`judges.RobustPath`), and not by the attacked copy.
"""

from __future__ import annotations

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


def adaptive_trials(system: System, *, eps: float, effort: Effort, surrogate: System | None = None) -> list[Trial]:
    """Return the attacks on a system, the cheap ones first: each is made on the images that withstood the others.

    `surrogate`: another system, trained independently, whose images are tried on this one too.
    """
    steps, votes = effort.steps, effort.latents
    ranks = range(min(effort.targets, system.classes - 1))

    def first_pass(generator: object) -> Scores:
        return system.classifier_scores()

    made = [
        trials.untargeted("transfer-apgd-ce", first_pass, eps=eps, steps=steps),
        *(
            trials.targeted(f"transfer-apgd-t-{rank + 1}", first_pass, rank=rank, eps=eps, steps=steps)
            for rank in ranks[:TRANSFERRED_TARGETS]
        ),
        *(untargeted(system, average, eps=eps, steps=steps, votes=votes) for average in AVERAGES),
        *(
            trials.targeted(
                f"apgd-t-{average}-{rank + 1}",
                _through(system, average, votes=votes),
                rank=rank,
                eps=eps,
                steps=steps,
                latents=votes,
            )
            for average in TARGETED
            for rank in ranks
        ),
        trials.descent(
            "pgd-softmax", _through(system, "softmax", votes=votes), eps=eps, steps=effort.pgd_steps, latents=votes
        ),
    ]
    if surrogate is not None:
        made += [
            untargeted(surrogate, "logits", eps=eps, steps=steps, votes=votes, prefix="surrogate-"),
            *(
                trials.targeted(
                    f"surrogate-apgd-t-logits-{rank + 1}",
                    _through(surrogate, "logits", votes=votes),
                    rank=rank,
                    eps=eps,
                    steps=steps,
                    latents=votes,
                )
                for rank in ranks[:TRANSFERRED_TARGETS]
            ),
        ]
    held = effort.latents_of_square

    def answers(generator: torch.Generator) -> Scores:
        return system.held("softmax", votes=held, generator=generator)

    return [
        *made,
        trials.squares_and_gradients(
            "square-apgd-logits",
            answers,
            _through(system, "logits", votes=votes),
            eps=eps,
            queries=effort.queries,
            steps=steps,
            goal=GOAL,
            latents=votes,
            latents_of_square=held,
        ),
        trials.search("random-search", answers, eps=eps, queries=effort.queries // 5, latents=held),
    ]


def untargeted(system: System, average: Average, *, eps: float, steps: int, votes: int, prefix: str = "") -> Trial:
    """Return APGD on the cross-entropy through all of a system.

    Of ``log-probabilities`` it is the mean of the votes' own cross-entropies, the loss of EoT-PGD.
    """
    return trials.untargeted(
        f"{prefix}apgd-ce-{average}",
        _through(system, average, votes=votes),
        eps=eps,
        steps=steps,
        loss=negative_log if average == "log-probabilities" else cross_entropy,
        latents=votes,
    )


def _through(system: System, average: Average, *, votes: int) -> trials.View:
    return lambda generator: system.fresh(average, votes=votes, generator=generator)
