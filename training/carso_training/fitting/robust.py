"""Training the classifier by strong attacks alone, as Madry et al. (2018, arXiv:1706.06083) do.

Each batch is seen clean and under PGD from a random start, made on the network as it is at that step. The loss is the
cross-entropy of the attacked images plus `clean` times that of the clean ones. The strength of the attacks rises with
the share of the training that is done: from the start at full strength, deep networks learn nothing.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from carso_training.attacks import attack_named
from carso_training.datasets.examples import Examples
from carso_training.fitting.classifier import own_attack_accuracies
from carso_training.fitting.hardened import attacked_images, strengths
from carso_training.fitting.loop import fit, risen_at
from carso_training.fitting.purifier import multiplies_bf16
from carso_training.networks import Classifier, build_classifier
from carso_training.recipe import Recipe

VALIDATION_IMAGES = 1000
VALIDATION_ATTACKS = tuple(map(attack_named, ("pgd-0.15", "pgd-0.30")))


def train_robust(fabric: Fabric, recipe: Recipe, *, train: Examples, held_out: Examples, folder: Path) -> Classifier:
    """Train the classifier of a recipe that has a `robust_training`. Raises what `fit` does.

    `held_out` is never trained on; the figures of each epoch come from it.
    """
    robust = recipe.robust_training
    assert robust is not None
    torch.manual_seed(recipe.seed)
    network = build_classifier(recipe.classifier)
    held_out = held_out[slice(VALIDATION_IMAGES)]
    bf16 = recipe.purification_bf16 and multiplies_bf16(fabric.device)
    dtype = torch.bfloat16 if bf16 else torch.float32

    def batch_loss(model: nn.Module, rows: Tensor, generator: torch.Generator, done: float) -> dict[str, Tensor]:
        images, labels = train.moved(rows, by=recipe.shifts, generator=generator), train.labels[rows]
        # not `model`: a distributed wrapper would wait for gradients
        attacked_network = deepcopy(network).eval().requires_grad_(False).to(dtype)
        risen = risen_at(done, rise=robust.rise)
        attacked = attacked_images(
            lambda x: attacked_network(x.to(dtype)),
            images,
            labels,
            eps=strengths(robust.eps, len(images), generator) * risen,
            steps=robust.steps,
            generator=generator,
        )
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            scores = model(torch.cat([images, attacked]))
        clean_scores, attacked_scores = scores.float().split(len(images))
        loss_clean, loss_attacked = F.nll_loss(clean_scores, labels), F.nll_loss(attacked_scores, labels)
        return {
            "loss": robust.clean * loss_clean + loss_attacked,
            "loss_clean": loss_clean,
            "loss_attacked": loss_attacked,
        }

    def validate(model: nn.Module) -> dict[str, float]:
        return own_attack_accuracies(model, VALIDATION_ATTACKS, held_out, seed=recipe.seed)

    return fit(
        fabric,
        network,
        title="robust classifier",
        folder=folder,
        rows=len(train),
        schedule=recipe.adversarial,
        seed=recipe.seed + 1,
        batch_loss=batch_loss,
        validate=validate,
    )
