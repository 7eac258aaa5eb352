"""The strong protocol, for a classifier alone: APGD, targeted APGD, PGD with restarts, Square with APGD after it.

The classifier is attacked through its raw scores, those before a last activation that may hide gradients
(`networks/system.py`), and through the scores that it decides by.
"""

from __future__ import annotations

from carso_training.attacks.attack import Scores
from carso_training.robustness import trials
from carso_training.robustness.campaign import Trial
from carso_training.robustness.effort import Effort


def strong_trials(*, raw: Scores, scores: Scores, classes: int, eps: float, effort: Effort) -> list[Trial]:
    """Return the attacks on a classifier, the cheap ones first: each is made on the images that withstood the others.

    `raw` and `scores` are the classifier before and after its last activation.
    """
    ranks, steps = range(min(effort.targets, classes - 1)), effort.steps

    def before(generator: object) -> Scores:
        return raw

    def after(generator: object) -> Scores:
        return scores

    return [
        trials.untargeted("apgd-ce-raw", before, eps=eps, steps=steps),
        trials.untargeted("apgd-ce", after, eps=eps, steps=steps),
        *(trials.targeted(f"apgd-t-raw-{r + 1}", before, rank=r, eps=eps, steps=steps) for r in ranks),
        *(trials.descent(f"pgd-raw-{n + 1}", before, eps=eps, steps=effort.pgd_steps) for n in range(effort.restarts)),
        trials.squares_and_gradients(
            "square-apgd-raw", after, before, eps=eps, queries=effort.queries, steps=effort.steps
        ),
    ]
