"""Counting proofs: the images whose label is right, and the same for every image within eps (docs/certificate.md).

No attack can change these counts, and there is no chance in them, so all images of the split are counted, on the graphs
that the service runs. At the eps that services prove by default, attacked images are counted too: an attack cannot take
a proven label, but it can take the proof, and that is what the service's alarm sees.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from carso.bundle import Bundle, Cell, Proofs, Threat
from carso.choices import DEFAULT_EPS
from carso.inference.certificate import rounded_up
from carso.inference.sessions import Sessions

from carso_training.attacks import Attack
from carso_training.attacks.batches import attacked_batches
from carso_training.attacks.pgd import PGD
from carso_training.datasets.examples import Examples
from carso_training.export.weights import classifier_of
from carso_training.robustness import figures
from carso_training.robustness.figures import Figure, Split, Tried

BATCH = 500


def certified(
    bundle: Bundle,
    *,
    data: Examples,
    split: Split,
    strengths: Sequence[float],
    out: Path,
    threads: int | None = None,
    attacked_at: float = DEFAULT_EPS,
) -> list[Figure]:
    """Write a figure for each eps into `out`, and return them. `data`: the whole split, on the CPU.

    A figure's ``proven`` counts wrong labels too: a certificate does not say that a label is right. The figure at the
    eps `attacked_at` has two trials more, by PGD at half that eps and at all of it; see `_attacked`. Raises DeviceError
    if the bundle has no bounds or its graphs do not run, and OSError.
    """
    sessions = Sessions(bundle, device="cpu", threads=threads)
    images, truth = data.pixels().numpy(), data.labels.numpy()
    measured = figures.measured(bundle, split=split, subset=f"all {len(data)}", device="cpu")
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for eps in strengths:
        began = time.perf_counter()
        labels, proven = _proven(sessions, images, eps=eps)
        right = labels == truth
        seconds = round(time.perf_counter() - began, 2)
        clean, both = int(right.sum()), int((right & proven).sum())
        settings: figures.Settings = {"proven": int(proven.sum())}
        tried = Tried(attack="interval bounds", settings={}, attacked=clean, broken=clean - both, seconds=seconds)
        attacked = _attacked(bundle, sessions, data, eps=eps, safe=right & proven) if eps == attacked_at else ()
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
            trials=(tried, *attacked),
            seed=0,
            seconds=seconds + sum(each.seconds for each in attacked),
        )
        figures.write(out, figure)
        made.append(figure)
    return made


def proofs_of(bundle: Bundle, *, validation: Examples, eps: float) -> Proofs:
    """Count the `validation` images, which nothing was trained on, whose first pass's label is proven within `eps`.

    The service compares traffic with this rate. Raises DeviceError if the bundle has no bounds, or its graphs do not
    run.
    """
    _, proven = _proven(Sessions(bundle, device="cpu"), validation.pixels().cpu().numpy(), eps=eps)
    return Proofs(eps=eps, images=len(validation), proven=int(proven.sum()))


def _proven(sessions: Sessions, images: np.ndarray, *, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the first pass's labels [n] int64 of images [n, *shape] float32, and whether each is proven [n] bool."""
    labels, margins = [], []
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        found = sessions.first_pass_with_bounds(part, np.full(len(part), rounded_up(eps)))
        labels.append(found.probabilities.argmax(axis=1))
        margins.append(found.margins)
    return np.concatenate(labels), np.concatenate(margins) > 0


def _attacked(bundle: Bundle, sessions: Sessions, data: Examples, *, eps: float, safe: np.ndarray) -> tuple[Tried, ...]:
    """Attack all images by PGD on the classifier, and count those that are still proven at `eps`, whatever their label.

    `safe`: which images [n] bool were right and proven at `eps` before. Of those, none of an attack within `eps` can
    get a wrong label; the trial's settings say how many did, and how many proven labels of all images are wrong.
    """
    trials = []
    for strength in (eps / 2, eps):
        began, attack = time.perf_counter(), Attack(PGD, strength)
        images = torch.cat([*attacked_batches(classifier_of(bundle), attack, data, seed=0, quiet=True)]).numpy()
        labels, proven = _proven(sessions, images, eps=eps)
        wrong = labels != data.labels.numpy()
        settings: figures.Settings = {
            "eps": strength,
            **attack.method.settings,
            "wrong": int(wrong.sum()),
            "proven_and_wrong": int((proven & wrong).sum()),
            "wrong_of_right_and_proven": int((safe & wrong).sum()),
        }
        seconds = round(time.perf_counter() - began, 2)
        lost = int((~proven).sum())
        trials.append(
            Tried(attack="pgd takes the proof", settings=settings, attacked=len(data), broken=lost, seconds=seconds)
        )
    return tuple(trials)
