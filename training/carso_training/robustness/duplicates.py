"""How near the codes of clean images come by chance: nearer than that is a near-duplicate.

The service compares an image with the last images of its caller (``carso.inference.duplicates``). The same is done here
with validation images, which nothing was trained on, in several random orders: the distance is such that a share of
FALSE_ALARMS of them are nearer to an earlier one. Ten times as many would notice an attack one query sooner
(docs/duplicates.md).
"""

from __future__ import annotations

import numpy as np
from carso.bundle import Bundle, NearDuplicates
from carso.inference.duplicates import REMEMBERED
from carso.inference.sessions import Sessions

from carso_training.datasets.examples import Examples

FALSE_ALARMS = 0.001
ORDERS = 20
ROWS = 256  # images of one first pass


def near_duplicates_of(bundle: Bundle, *, validation: Examples, seed: int) -> NearDuplicates:
    """Measure the distance on `validation` images. Raises DeviceError if the graphs do not run."""
    codes = codes_of(Sessions(bundle, device="cpu"), validation.pixels().cpu().numpy())
    orders = np.random.default_rng(seed)
    nearest = np.concatenate([_nearest(codes[orders.permutation(len(codes))]) for _ in range(ORDERS)])
    return NearDuplicates(
        distance=round(float(np.quantile(nearest, FALSE_ALARMS)), 4), share=FALSE_ALARMS, images=len(codes)
    )


def codes_of(sessions: Sessions, images: np.ndarray) -> np.ndarray:
    """Return the codes [N, code] of images [N, *shape]."""
    parts = range(0, len(images), ROWS)
    return np.concatenate([sessions.first_pass(images[start : start + ROWS]).codes for start in parts])


def _nearest(codes: np.ndarray) -> np.ndarray:
    """Return how far each of `codes` [N, code] but the first is from the nearest of those REMEMBERED before it."""
    return np.array(
        [
            np.sqrt(((codes[max(0, place - REMEMBERED) : place] - code) ** 2).sum(axis=1).min())
            for place, code in enumerate(codes[1:], 1)
        ]
    )
