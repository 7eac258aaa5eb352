"""Images for a README: test images, clean and attacked, as PNG files.

The attacked ones are *chosen*: on each of them the attack (PGD, eps 0.30, made against the IAT classifier and rounded
to the file's eight bits) fools the fast path and not CARSO, by a clear vote. They show what the service is for, and
measure nothing. The samples that a bundle ships (`samples.py`) are not chosen.
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
from carso_training.robustness.published import RISK
from carso_training.robustness.voting import robust_results, vote_seeds

ATTACK = attack_named("pgd-0.30")
CANDIDATES = 10_000
CLEAR = 0.9  # of the votes


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

    `samples`: votes per image; a count ends early at the risk of the published table. Raises TrainingError if fewer
    classes show the difference among the first 10 000 images of `data`, and OSError if a file cannot be written.
    """
    data = data[slice(CANDIDATES)]
    attacked = torch.cat([*attacked_batches(classifier, ATTACK, data, seed=seed)])
    stored = (attacked * 255).round().byte().cpu()
    seen = stored.float() / 255
    with torch.no_grad():
        fast = classifier(seen.to(data.images.device)).argmax(dim=1).cpu()
        fast_clean = classifier(data.pixels()).argmax(dim=1).cpu()
    labels = data.labels.cpu()
    fooled = torch.nonzero((fast != labels) & (fast_clean == labels)).flatten()
    seeds = vote_seeds(len(fooled), seed=seed, part=0)
    results = robust_results(pipeline, seen[fooled].numpy(), samples=samples, risk=RISK, seeds=seeds)
    clear = [
        result.outcomes[0].tally[label] >= CLEAR * result.outcomes[0].votes
        for result, label in zip(results, labels[fooled].tolist(), strict=True)
    ]
    telling = fooled[torch.tensor(clear, dtype=torch.bool)].tolist()
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
