"""What an answer can show of an image's vote: the purified images that the first votes were cast on, and their mean.

An explanation depends on the image, its seed and the number of votes cast, and on nothing else. So it can be made
again.
"""

from __future__ import annotations

import numpy as np

from carso.inference.jobs import Explanation

SHOWN = 6  # purified images that are shown, at most: those of the first votes
AVERAGED = 32  # purified images that the mean is of, at most: those of the first votes
ROWS = 2 * AVERAGED + 1  # of work that one explanation costs, at most
DECIMALS = 6  # of the distance: beyond them, devices differ


def explanation(image: np.ndarray, votes: np.ndarray, purified: np.ndarray) -> Explanation:
    """Explain the count of `image` [*shape] by its first `votes` [n] and the `purified` images [n + 1, *shape] that
    they were cast on. The last of these is the one at the latent 0, which got no vote.
    """
    *_, typical = purified
    return Explanation(
        purified=typical,
        distance=round(float(np.abs(image - typical).mean(dtype=np.float64)), DECIMALS),
        mean=purified[:-1].mean(axis=0),
        averaged=len(votes),
        votes=tuple(votes[:SHOWN].tolist()),
        shown=purified[: min(len(votes), SHOWN)],
    )
