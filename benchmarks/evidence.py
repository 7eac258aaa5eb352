"""After how many images an attack is noticed, and what taking note of one image costs.

    python -m benchmarks.evidence

Simulated: ten thousand clean images, then a stream of which a share is attacked, 21 times with fixed seeds. The clean
rate is that of the reference bundle. The promise and its proof are in ``carso.telemetry.evidence``.
"""

from __future__ import annotations

import random
import time
from math import inf
from statistics import median

from carso.bundle import Bundle
from carso.settings import REFERENCE_BUNDLE
from carso.telemetry.evidence import ALARM, Evidence, upper_bound

CLEAN_IMAGES = 10_000
MOST = 100_000
RUNS = 21


def noticed_after(*, clean: float, attacked: float, bound: float, seed: int) -> float:
    """Return the images of a stream with a rate of `attacked` until the alarm; infinite if there is none in MOST."""
    chance = random.Random(seed)
    test = Evidence(bound)
    for _ in range(CLEAN_IMAGES):
        test.add(chance.random() < clean)
    for image in range(1, MOST + 1):
        test.add(chance.random() < attacked)
        if test.value >= ALARM:
            return image
    return inf


def main() -> None:
    """Print a Markdown table, and microseconds per image."""
    measured = Bundle.load(REFERENCE_BUNDLE).manifest.disagreement
    assert measured is not None
    clean, bound = measured.rate, upper_bound(measured.disagree, measured.images)
    print(f"clean: {clean:.4f}, bound: {bound:.4f}\n")
    print("| share of attacked images | of which the paths disagree on | images until the alarm, median | most |")
    print("| ---: | ---: | ---: | ---: |")
    for fooled in (1.0, 0.45):
        for share in (0.2, 0.05, 0.01):
            rate = clean * (1 - share) + fooled * share
            found = [noticed_after(clean=clean, attacked=rate, bound=bound, seed=seed) for seed in range(RUNS)]
            row = [f"none in {MOST}" if value == inf else f"{value:.0f}" for value in (median(found), max(found))]
            print(f"| {share:.0%} | {fooled:.0%} | {row[0]} | {row[1]} |")
    test, began = Evidence(bound), time.perf_counter()
    for image in range(300_000):
        test.add(image % 70 == 0)
    print(f"\n{(time.perf_counter() - began) / 0.3:.2f} us per image")


if __name__ == "__main__":
    main()
