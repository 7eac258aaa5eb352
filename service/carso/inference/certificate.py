"""Proving labels: that the first pass gives the same label to every image within eps of one.

The margins come from the bundle's graph of bounds; docs/certificate.md has the proof. All here is about which eps to
ask for. eps is in units of the input's values, and an image is within eps if no value differs by more.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from carso.bundle import BOUNDS, Bundle
from carso.choices import BISECTIONS, CPU
from carso.inference.jobs import Certificate

STEPS = 2**BISECTIONS  # `max` finds the largest proven multiple of 1/STEPS

Margins = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""images [B, *shape] float32, eps [B] float32 -> margins [B] float32; see Sessions.first_pass_with_bounds."""


def unproven(bundle: Bundle, *, provider: str) -> str | None:
    """Return why nothing can be proven of a bundle's labels on an execution provider, and the mend; None: it can be."""
    if provider != CPU:
        return (
            "a certificate is proven for sums of float32 products, as processors compute them, and not for "
            f"{provider}, where products may be TF32 and convolutions other sums: set CARSO_DEVICE=cpu"
        )
    if bundle.bounds is not None:
        return None
    if because := bundle.manifest.unbounded:
        return f"bundle {bundle.manifest.name} has no {BOUNDS}, since {because}"
    return f"bundle {bundle.manifest.name} has no {BOUNDS}: add it with `carso-train bounds {bundle.folder}`"


def rounded_up(eps: float) -> np.float32:
    """Return the smallest float32 number that is at least eps: proving more is safe, proving less is not."""
    near = np.float32(eps)
    return near if float(near) >= eps else np.nextafter(near, np.float32(math.inf))


def largest(margins: Margins, images: np.ndarray) -> tuple[Certificate | None, ...]:
    """Return the largest multiple of 1/STEPS below 1 that is proven of each image [n, *shape]; None: nothing is.

    It bisects, and asks for margins BISECTIONS times.
    """
    best: list[Certificate | None] = [None] * len(images)
    proven, unknown = np.zeros(len(images), np.int64), np.full(len(images), STEPS)  # nothing is proven of STEPS
    for _ in range(BISECTIONS):
        middle = (proven + unknown) // 2
        eps = middle / STEPS  # exact in float32
        found = margins(images, eps.astype(np.float32))
        for image, (tried, margin) in enumerate(zip(eps.tolist(), found.tolist(), strict=True)):
            best[image] = certificate(tried, margin) or best[image]
        proven, unknown = np.where(found > 0, middle, proven), np.where(found > 0, unknown, middle)
    return tuple(best)


def certificate(eps: float, margin: float) -> Certificate | None:
    """Return what a margin at `eps`, or above, proves; None: nothing."""
    return Certificate(eps, margin) if margin > 0 else None  # not so for NaN
