"""Counting proofs: the images whose label is right, and the same for every image within eps (docs/certificate.md).

There is no attack here and no chance, so all images of the split are counted, on the graphs that the service runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from carso.bundle import Bundle, Cell, Proofs, Threat
from carso.inference.certificate import rounded_up
from carso.inference.sessions import Sessions

from carso_training.datasets.examples import Examples
from carso_training.robustness import figures
from carso_training.robustness.figures import Figure, Split, Tried

BATCH = 500


def certified(
    bundle: Bundle, *, data: Examples, split: Split, strengths: Sequence[float], out: Path, threads: int | None = None
) -> list[Figure]:
    """Write a figure for each eps into `out`, and return them. `data`: the whole split, on the CPU.

    A figure's ``proven`` counts wrong labels too: a certificate does not say that a label is right. Raises DeviceError
    if the bundle has no bounds or its graphs do not run, and OSError.
    """
    sessions = Sessions(bundle, device="cpu", threads=threads)
    parts = list(_batches(data))
    labels = [sessions.first_pass(part.pixels().numpy()).probabilities.argmax(axis=1) for part in parts]
    right = np.concatenate([found == part.labels.numpy() for found, part in zip(labels, parts, strict=True)])
    measured = figures.measured(bundle, split=split, subset=f"all {len(data)}", device="cpu")
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for eps in strengths:
        began = time.perf_counter()
        margins = [
            sessions.margins(part.pixels().numpy(), found, np.full(len(part), rounded_up(eps)))
            for part, found in zip(parts, labels, strict=True)
        ]
        proven = np.concatenate(margins) > 0
        seconds = round(time.perf_counter() - began, 2)
        clean, both = int(right.sum()), int((right & proven).sum())
        settings: figures.Settings = {"proven": int(proven.sum())}
        tried = Tried(attack="interval bounds", settings={}, attacked=clean, broken=clean - both, seconds=seconds)
        figure = Figure(
            protocol="certified",
            measured=measured,
            cell=Cell(
                defence="classifier",
                threat=Threat(attack="certified", norm="linf", eps=eps, sees="classifier", settings=settings),
                correct=both,
                images=len(data),
                published=None,
            ),
            clean=clean,
            trials=(tried,),
            seed=0,
            seconds=seconds,
        )
        figures.write(out, figure)
        made.append(figure)
    return made


def proofs_of(bundle: Bundle, *, validation: Examples, eps: float) -> Proofs:
    """Count the `validation` images, which nothing was trained on, whose first pass's label is proven within `eps`.

    The service compares traffic with this rate. Raises DeviceError if the bundle has no bounds, or its graphs do not
    run.
    """
    sessions, proven = Sessions(bundle, device="cpu"), 0
    for part in _batches(validation):
        images = part.pixels().cpu().numpy()
        labels = sessions.first_pass(images).probabilities.argmax(axis=1)
        proven += int((sessions.margins(images, labels, np.full(len(images), rounded_up(eps))) > 0).sum())
    return Proofs(eps=eps, images=len(validation), proven=proven)


def _batches(data: Examples) -> Iterator[Examples]:
    for start in range(0, len(data), BATCH):
        yield data[slice(start, start + BATCH)]
