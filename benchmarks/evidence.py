"""After how many images an attack is noticed, and what taking note of one image costs.

    python -m benchmarks.evidence --bundle FOLDER

Simulated: ten thousand clean images, then a stream of which a share is attacked, 21 times with fixed seeds. The clean
rates are those of the bundle: of disagreement, and of images that are not proven, where it says so. The promise and its
proof are in ``carso.telemetry.evidence``.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from math import inf
from statistics import median

import typer
from carso.bundle import Bundle
from carso.telemetry.evidence import ALARM, Evidence, upper_bound

from benchmarks.report import REFERENCE, BundleFolder

CLEAN_IMAGES = 10_000
MOST = 100_000
RUNS = 21
ATTACKED = (0.2, 0.05, 0.01)  # shares of the stream


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


def show(sign: str, *, shown: int, images: int, among_attacked: Sequence[float]) -> None:
    """Print a Markdown table of one sign, which `shown` of `images` clean images show, and each of these shares of the
    attacked ones.
    """
    clean, bound = shown / images, upper_bound(shown, images)
    print(f"clean images that {sign}: {clean:.4f}, bound: {bound:.4f}\n")
    if bound == 1:
        print("All may show it, so there is no evidence.\n")
        return
    print(f"| share of attacked images | of which {sign} | images until the alarm, median | most |")
    print("| ---: | ---: | ---: | ---: |")
    for of_attacked in among_attacked:
        for share in ATTACKED:
            rate = clean * (1 - share) + of_attacked * share
            found = [noticed_after(clean=clean, attacked=rate, bound=bound, seed=seed) for seed in range(RUNS)]
            row = [f"none in {MOST}" if value == inf else f"{value:.0f}" for value in (median(found), max(found))]
            print(f"| {share:.0%} | {of_attacked:.0%} | {row[0]} | {row[1]} |")
    print()


def main(*, bundle: BundleFolder = REFERENCE) -> None:
    """Print a table for each sign that the bundle was measured for, and microseconds per image."""
    manifest = Bundle.load(bundle).manifest
    if (paths := manifest.disagreement) is not None:
        show("the paths disagree on", shown=paths.disagree, images=paths.images, among_attacked=(1.0, 0.45))
    if (proofs := manifest.proofs) is not None:
        unproven = proofs.images - proofs.proven
        show("are not proven", shown=unproven, images=proofs.images, among_attacked=(1.0, 0.5))
    test, began = Evidence(0.02), time.perf_counter()
    for image in range(300_000):
        test.add(image % 70 == 0)
    print(f"{(time.perf_counter() - began) / 0.3:.2f} us per image")


if __name__ == "__main__":
    typer.run(main)
