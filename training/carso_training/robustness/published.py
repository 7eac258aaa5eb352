"""The published measurement: each attack on each classifier, on images never trained on.

The attacks see a classifier only. The undefended classifier and the adversarially trained (IAT) one each answer for
images made against itself: white-box accuracy. CARSO answers for the images made against the IAT classifier: *transfer
accuracy*, which does not tell how CARSO fares against an attacker who differentiates through all of it.

Everything is computed in float32: DeepFool's images lie on the decision boundary, and coarser rounding alone would undo
the attack on many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from carso.bundle import Cell
from carso.inference.pipeline import Pipeline
from torch import Tensor

from carso_training.attacks import Attack, attack_named
from carso_training.attacks.batches import attacked_batches
from carso_training.datasets.examples import Examples
from carso_training.networks import Classifier
from carso_training.robustness.voting import robust_answers, vote_seeds

# Accuracy in percent on the whole MNIST test set: E. Ballarin, "Counteradversarial Recall of Synthetic
# Observations" (2022). The slides print some attacks' norm as L2; the numbers are those of L-infinity attacks.
DEFENCES = ("undefended", "classifier", "carso")
PUBLISHED_FOR = "mnist"
PUBLISHED_ACCURACIES: dict[str, tuple[float, float, float]] = {
    "clean": (98.40, 97.17, 96.72),
    "fgsm-0.15": (12.09, 91.89, 93.62),
    "fgsm-0.30": (1.21, 76.94, 86.43),
    "fgsm-0.50": (1.00, 12.29, 13.59),
    "pgd-0.15": (1.60, 90.54, 93.44),
    "pgd-0.30": (6.85, 71.26, 86.27),
    "pgd-0.50": (20.66, 11.67, 38.38),
    "deepfool-0.15": (0.66, 90.25, 95.06),
    "deepfool-0.30": (0.00, 60.54, 93.31),
    "deepfool-0.50": (0.00, 0.78, 71.34),
}
PUBLISHED_ATTACKS = tuple(attack_named(name) for name in PUBLISHED_ACCURACIES)

# A vote count ends early at this risk: the chance that an image's answer is not that of the full count, at most.
RISK = 1e-6


def measure(
    *,
    undefended: Classifier,
    classifier: Classifier,
    pipeline: Pipeline,
    data: Examples,
    samples: int,
    seed: int,
    risk: float = RISK,
    attacks: Sequence[Attack] = PUBLISHED_ATTACKS,
    published: Mapping[str, Sequence[float]] | None = None,
    report: Callable[[Cell], None] = lambda cell: None,
) -> list[Cell]:
    """Return one cell per attack and defence over all of `data`; `report` is called with each as it is known.

    `classifier` is the IAT classifier of the bundle that `pipeline` runs, on the device of `data`. `samples`: votes
    asked for; a count ends early at `risk`. `seed` decides the attacks and the votes: each image of each attack has
    latents of its own. `published`: figures to show beside the measured ones, per attack and in the order of DEFENCES.
    """
    cells = []
    for place, attack in enumerate(attacks):
        correct = dict.fromkeys(DEFENCES, 0)
        seeds = vote_seeds(len(data), seed=seed, part=place)
        offset = 0
        for against_undefended, against_classifier in zip(
            attacked_batches(undefended, attack, data, seed=seed + place, quiet=True),
            attacked_batches(classifier, attack, data, seed=seed + place),
            strict=True,
        ):
            rows = slice(offset, offset + len(against_classifier))
            offset = rows.stop
            labels = data.labels[rows]
            correct["undefended"] += _correct(undefended, against_undefended, labels)
            correct["classifier"] += _correct(classifier, against_classifier, labels)
            answers = robust_answers(
                pipeline, against_classifier.cpu().numpy(), samples=samples, risk=risk, seeds=seeds[rows]
            )
            correct["carso"] += int((answers == labels.cpu().numpy()).sum())
        known = (published or {}).get(attack.name, (None,) * len(DEFENCES))
        for defence, accuracy in zip(DEFENCES, known, strict=True):
            cells.append(
                Cell(
                    defence=defence,
                    threat=attack.threat("classifier"),
                    correct=correct[defence],
                    images=len(data),
                    published=accuracy,
                )
            )
            report(cells[-1])
    return cells


@torch.no_grad()
def _correct(classifier: Classifier, images: Tensor, labels: Tensor) -> int:
    return int((classifier(images).argmax(dim=1) == labels).sum())
