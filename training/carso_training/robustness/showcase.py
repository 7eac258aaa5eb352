"""Images for a README: test images, clean and attacked, as PNG files.

The attacked ones are *chosen*: on each of them the attack (PGD, eps 0.30, made against the IAT classifier and rounded
to the file's eight bits) fools the fast path and not CARSO. They show what the service is for, and measure nothing. The
samples that a bundle ships (`samples.py`) are not chosen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from carso.inference.pipeline import Pipeline
from PIL import Image

from carso_training.attacks import attack_named
from carso_training.attacks.batches import attacked_batches
from carso_training.datasets.examples import Examples
from carso_training.errors import TrainingError
from carso_training.networks import Classifier
from carso_training.robustness.voting import robust_answers, vote_seeds

ATTACK = attack_named("pgd-0.30")
CANDIDATES = 1000


def write_showcase(
    folder: Path,
    *,
    classifier: Classifier,
    pipeline: Pipeline,
    data: Examples,
    count: int,
    samples: int,
    seed: int,
) -> list[Path]:
    """Write `count` images of different classes, each clean and attacked; return the files' paths.

    `samples`: votes per image, all of which are cast. Raises TrainingError if fewer classes show the difference among
    the first 1 000 images of `data`, and OSError if a file cannot be written.
    """
    data = data[slice(CANDIDATES)]
    attacked = torch.cat([*attacked_batches(classifier, ATTACK, data, seed=seed)])
    stored = (attacked * 255).round().byte().cpu()
    seen = stored.float() / 255
    with torch.no_grad():
        fast = classifier(seen.to(data.images.device)).argmax(dim=1).cpu()
        fast_clean = classifier(data.pixels()).argmax(dim=1).cpu()
    labels = data.labels.cpu()
    seeds = vote_seeds(len(data), seed=seed, part=0)
    robust = torch.from_numpy(robust_answers(pipeline, seen.numpy(), samples=samples, risk=0.0, seeds=seeds))
    telling = torch.nonzero((fast != labels) & (fast_clean == labels) & (robust == labels)).flatten().tolist()
    chosen = {int(labels[row]): row for row in reversed(telling)}
    if len(chosen) < count:
        raise TrainingError(f"only {len(chosen)} classes have an image that shows the difference; asked for {count}")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for label, row in sorted(chosen.items())[:count]:
        for name, images in (("clean", data.images.cpu()), (ATTACK.name, stored)):
            path = folder / f"{label}-{name}.png"
            Image.fromarray(np.asarray(images[row].permute(1, 2, 0).squeeze(2))).save(path)
            written.append(path)
    return written
