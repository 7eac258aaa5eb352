"""Training the classifier for interval bounds (IBP: Gowal et al., 2018, arXiv:1810.12715).

The loss is k times the cross-entropy of the clean images, plus 1 - k times that of the worst scores that the bounds
allow within eps: the label's lead over every class is as small as `networks/bounds.py` lets it be. At first eps is 0
and k is 1. Both move in a straight line, until a share `rise` of the training is done, to `eps` and `clean`. The
weights begin as Shi et al. (2021, arXiv:2103.17268) have them, so that the boxes neither grow nor shrink from layer to
layer: from common beginnings they grow a thousandfold, and the bounds teach nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from carso_training.attacks import CLEAN
from carso_training.datasets.examples import Examples
from carso_training.fitting.classifier import VALIDATION_BATCH, accuracy
from carso_training.fitting.loop import fit, risen_at
from carso_training.networks import Classifier, build_classifier
from carso_training.networks.bounds import box_of, margins
from carso_training.recipe import Recipe

VALIDATION_EPS = (0.15, 0.30)


def train_certified(fabric: Fabric, recipe: Recipe, *, train: Examples, held_out: Examples, folder: Path) -> Classifier:
    """Train the classifier of a recipe that has a `certified_training`. Raises what `fit` does.

    `held_out` is never trained on; the figures of each epoch come from it: the share of images that are right, and
    the shares whose label is right and proven at each eps.
    """
    certified = recipe.certified_training
    assert certified is not None
    torch.manual_seed(recipe.seed)
    network = build_classifier(recipe.classifier)
    begin(network)

    def batch_loss(model: nn.Module, rows: Tensor, generator: torch.Generator, done: float) -> dict[str, Tensor]:
        images, labels = train.moved(rows, by=recipe.shifts, generator=generator), train.labels[rows]
        risen = risen_at(done, rise=certified.rise)
        eps = torch.full((len(images),), certified.eps * risen, device=images.device)
        scores = model(images)
        leads = margins(_chain(network), box_of(images, eps), labels, slack=False)
        loss_clean, loss_bounds = F.nll_loss(scores, labels), F.cross_entropy(-leads, labels)
        clean = 1 - (1 - certified.clean) * risen
        return {
            "loss": clean * loss_clean + (1 - clean) * loss_bounds,
            "loss_clean": loss_clean,
            "loss_bounds": loss_bounds,
        }

    def validate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Classifier)
        images, labels = held_out.pixels(), held_out.labels
        shares = {f"certified-{eps:.2f}": certified_accuracy(model, images, labels, eps=eps) for eps in VALIDATION_EPS}
        return {CLEAN.name: accuracy(model, images, labels)} | shares

    return fit(
        fabric,
        network,
        title="certified classifier",
        folder=folder,
        rows=len(train),
        schedule=recipe.adversarial,
        seed=recipe.seed + 1,
        batch_loss=batch_loss,
        validate=validate,
    )


@torch.no_grad()
def begin(network: nn.Module) -> None:
    """Draw the weights of all linear layers and convolutions again, from N(0, 2 pi / fan-in^2); biases become 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / layer.weight[0].numel())
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def certified_accuracy(classifier: Classifier, images: Tensor, labels: Tensor, *, eps: float) -> float:
    """Return the share of images [N, *shape] whose label is right and proven at `eps`, in real numbers, in [0, 1]."""
    proven = 0
    for x, y in zip(images.split(VALIDATION_BATCH), labels.split(VALIDATION_BATCH), strict=True):
        leads = margins(_chain(classifier), box_of(x, x.new_full((len(x),), eps)), y, slack=False)
        proven += int(((leads > 0) | F.one_hot(y, leads.shape[1]).bool()).all(dim=1).sum())
    return proven / len(labels)


def _chain(classifier: Classifier) -> Sequence[nn.Module]:
    layers = classifier.chain()
    assert layers is not None  # the recipe has seen to it
    return layers
