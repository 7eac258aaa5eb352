"""Is an image like those that the purifier knows?

Two figures tell. Both are in units of the input's values.

* *excess*: the mean over all values of max(|image - purified| - eps, 0). The threat model lets an attacker move each
  value by at most eps, so the excess is what no allowed change of a known image explains. The purified image is the
  decoder's at the latent 0, so the excess depends on the image alone and not on chance.
* *contrast*: the largest value of the image less the smallest. It tells images that are too faint to be read.

An image is *typical* if its excess is not above the bundle's threshold and its contrast not below. It is a sign and not
a proof: an image that is not typical may be read rightly, and a typical one may be attacked.
"""

from __future__ import annotations

import numpy as np

from carso.inference.jobs import Typicality

DECIMALS = 6  # of the figures: beyond them, devices differ


def typicalities(images: np.ndarray, purified: np.ndarray, *, eps: float) -> list[Typicality]:
    """Return the figures of each of `images` [n, *shape], from its purified version in `purified` [n, *shape]."""
    pixels, distances = (array.reshape(len(images), -1) for array in (images, np.abs(images - purified)))
    excess = np.maximum(distances - eps, 0).sum(axis=1, dtype=np.float64) / pixels.shape[1]
    contrast = (pixels.max(axis=1) - pixels.min(axis=1)).astype(np.float64)
    return [
        Typicality(round(over, DECIMALS), round(span, DECIMALS))
        for over, span in zip(excess.tolist(), contrast.tolist(), strict=True)
    ]
