"""The samples that a bundle ships: the first images of a split, each clean and under attack, whatever comes of it.

At each eps an image is attacked twice. `transfer`: the attacks of the strong protocol on the classifier of the first
pass, in turn, until the fast path errs. `adaptive`: those of the adaptive protocol through all of CARSO, in turn, until
CARSO errs. An image that withstands them all is shipped as the first of them left it. Attacked images are rounded to
the file's eight bits before they are judged, and stay in their ball.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from carso.bundle import Bundle
from carso.samples import INDEX, SAMPLES, Sample, SampleKind, Samples
from PIL import Image
from torch import Tensor

from carso_training.datasets.examples import Examples
from carso_training.robustness.adaptive import attacks_on_a_vote
from carso_training.robustness.campaign import Trial
from carso_training.robustness.effort import Effort
from carso_training.robustness.figures import Split
from carso_training.robustness.published import RISK
from carso_training.robustness.strong import strong_trials
from carso_training.robustness.system import system_of
from carso_training.robustness.voting import pipeline_of, robust_answers, vote_seeds

Answering = Callable[[np.ndarray], np.ndarray]
"""The stored images [N, *shape] in [0, 1] -> the classes that they are taken for, [N] int64."""


def samples_of(
    bundle: Bundle, *, data: Examples, split: Split, strengths: Sequence[float], effort: Effort, seed: int
) -> dict[str, bytes]:
    """Return the files of a bundle's samples, by their names in the bundle.

    `data`: the images, on the CPU, which must be the first of `split`. `seed` decides attacks and votes. Raises
    DeviceError if the bundle's graphs do not run.
    """
    system, pipeline = system_of(bundle), pipeline_of(bundle)
    seeds = vote_seeds(len(data), seed=seed, part=0)

    def fast(images: np.ndarray) -> np.ndarray:
        return pipeline.sessions.first_pass(images).probabilities.argmax(axis=1)

    def robust(images: np.ndarray) -> np.ndarray:
        return robust_answers(pipeline, images, samples=bundle.manifest.samples, risk=RISK, seeds=seeds)

    versions: list[tuple[SampleKind, float, Tensor, list[str]]] = [
        ("none", 0.0, data.images, ["none"] * len(data)),
    ]
    for eps in strengths:
        on_the_classifier = strong_trials(
            raw=system.classifier_scores(),
            scores=system.classifier_scores(raw=False),
            classes=system.classes,
            eps=eps,
            effort=effort,
        )
        through_all = attacks_on_a_vote(system, eps=eps, effort=effort)
        versions.append(("transfer", eps, *_attacked(on_the_classifier, data, eps=eps, answer=fast, seed=seed)))
        versions.append(("adaptive", eps, *_attacked(through_all, data, eps=eps, answer=robust, seed=seed)))

    found, files = [], {}
    for kind, eps, images, attacks in versions:
        fast_labels, robust_labels = fast(_pixels(images)), robust(_pixels(images))
        for index, image in enumerate(images):
            name = f"{index:05d}-clean.png" if kind == "none" else f"{index:05d}-{kind}-{eps:.2f}.png"
            files[f"{SAMPLES}/{name}"] = _png(image)
            found.append(
                Sample(
                    file=name,
                    index=index,
                    label=int(data.labels[index]),
                    kind=kind,
                    attack=attacks[index],
                    eps=eps,
                    seed=int(seeds[index]),
                    fast_label=int(fast_labels[index]),
                    robust_label=int(robust_labels[index]),
                )
            )
    found.sort(key=lambda sample: sample.index)  # stable: each image's versions stay in order
    described = Samples(split=split, risk=RISK, images=tuple(found))
    return {INDEX: (described.model_dump_json(indent=1) + "\n").encode(), **files}


def _attacked(
    trials: Sequence[Trial], data: Examples, *, eps: float, answer: Answering, seed: int
) -> tuple[Tensor, list[str]]:
    """Return the attacked images [N, *shape] uint8, and the name of the attack that made each."""
    clean, labels = data.pixels(), data.labels
    found, names = data.images.clone(), [trials[0].name] * len(data)
    left = torch.arange(len(data))
    for number, trial in enumerate(trials):
        made = trial.make(clean[left], labels[left], torch.Generator().manual_seed(seed))
        candidates = found.clone()
        candidates[left] = _stored(made, data.images[left], eps=eps)
        broken = torch.from_numpy(answer(_pixels(candidates)))[left] != labels[left]
        taken = left if number == 0 else left[broken]
        found[taken] = candidates[taken]
        for row in left[broken].tolist():
            names[row] = trial.name
        left = left[~broken]
        if not len(left):
            break
    return found, names


def _stored(images: Tensor, clean: Tensor, *, eps: float) -> Tensor:
    """Round images [N, *shape] in [0, 1] to uint8, at most `eps` away from `clean` [N, *shape] uint8."""
    furthest = int(255 * eps + 1e-6)
    change = ((images * 255).round() - clean).clamp(-furthest, furthest)
    return (clean + change).to(torch.uint8)


def _pixels(images: Tensor) -> np.ndarray:
    return (images.float() / 255).numpy()


def _png(image: Tensor) -> bytes:
    packed = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(packed, "png", optimize=True)
    return packed.getvalue()
