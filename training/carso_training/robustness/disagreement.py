"""How often the two paths of a bundle disagree on clean images: the rate that traffic is compared with."""

from __future__ import annotations

import numpy as np
from carso.bundle import Bundle, Disagreement

from carso_training.datasets.examples import Examples
from carso_training.robustness.published import RISK
from carso_training.robustness.voting import pipeline_of, robust_results, vote_seeds


def disagreement_of(bundle: Bundle, *, validation: Examples, seed: int) -> Disagreement:
    """Count the `validation` images, which nothing was trained on, on which the two paths give different labels.

    Raises DeviceError if the graphs do not run.
    """
    seeds = vote_seeds(len(validation), seed=seed, part=0)
    results = robust_results(
        pipeline_of(bundle),
        validation.pixels().cpu().numpy(),
        samples=bundle.manifest.samples,
        risk=RISK,
        seeds=seeds,
    )
    differ = [result.outcomes[0].label != int(np.argmax(result.probabilities[0])) for result in results]
    return Disagreement(images=len(differ), disagree=sum(differ))
