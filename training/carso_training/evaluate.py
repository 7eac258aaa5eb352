"""Measuring a system as the published table does: each attack on each classifier, on images never trained on.

The attacks see a classifier only. The columns `none` and `IAT` are white-box: each classifier answers for images made
against itself. The column `CARSO` is *transfer accuracy*: the images made against the IAT classifier, classified by
CARSO. It does not tell how CARSO fares against an attacker who differentiates through all of it.

CARSO's answers come from the service's own pipeline on the bundle's ONNX graphs. Everything is computed in float32:
DeepFool's images lie on the decision boundary, and coarser rounding alone would undo the attack on many.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from carso.bundle import Bundle, Cell
from carso.inference.pipeline import Ballot, Pipeline
from carso.inference.sessions import Sessions
from torch import Tensor

from carso_training.attacked import attacked_batches
from carso_training.attacks import PUBLISHED as PUBLISHED_ATTACKS
from carso_training.attacks import Attack
from carso_training.data import Dataset
from carso_training.networks import Classifier
from carso_training.table import COLUMNS, PUBLISHED

# A vote count ends early at this risk: the chance that an image's answer is not that of the full count, at most.
RISK = 1e-6
ROUND_ROWS = 512  # benchmarks/threads.py: larger rounds cost more per vote on a CPU


def pipeline_of(bundle: Bundle) -> Pipeline:
    return Pipeline(
        Sessions(bundle, device="auto"),
        latent=bundle.manifest.latent,
        classes=len(bundle.manifest.classes),
        round_rows=ROUND_ROWS,
    )


def evaluate(
    *,
    undefended: Classifier,
    adversarial: Classifier,
    pipeline: Pipeline,
    data: Dataset,
    samples: int,
    seed: int,
    risk: float = RISK,
    attacks: tuple[Attack, ...] = PUBLISHED_ATTACKS,
    report: Callable[[Cell], None] = lambda cell: None,
) -> list[Cell]:
    """One cell per attack and column over all of `data`; `report` is called with each as it is known."""
    cells = []
    for place, attack in enumerate(attacks):
        correct = dict.fromkeys(COLUMNS, 0)
        offset = 0
        for by_none, by_iat in zip(
            attacked_batches(undefended, attack, data, seed=seed + place, quiet=True),
            attacked_batches(adversarial, attack, data, seed=seed + place),
            strict=True,
        ):
            labels = data.labels[offset : offset + len(by_iat)]
            offset += len(by_iat)
            correct["none"] += _right(undefended, by_none, labels)
            correct["IAT"] += _right(adversarial, by_iat, labels)
            outcomes = pipeline.classify(by_iat.cpu().numpy(), Ballot(samples=samples, risk=risk))
            answers = torch.tensor([outcome.label for outcome in outcomes])
            correct["CARSO"] += int((answers == labels.cpu()).sum())
        for column, published in zip(COLUMNS, PUBLISHED[attack.name], strict=True):
            cells.append(
                Cell(
                    attack=attack.name,
                    column=column,
                    kind="transfer" if column == "CARSO" else "white-box",
                    correct=correct[column],
                    images=len(data),
                    published=published,
                )
            )
            report(cells[-1])
    return cells


@torch.no_grad()
def _right(classifier: Classifier, images: Tensor, labels: Tensor) -> int:
    return int((classifier(images).argmax(dim=1) == labels).sum())
