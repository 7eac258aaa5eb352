"""Training the classifier: undefended, and by iterative adversarial training (IAT).

The loss is the squared L2 distance between softmax output and one-hot label, on the clean batch and on its attacked
versions. These are the attacks that the recipe foresees, made again on the network as it is at each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from carso_training.attacks import CLEAN, Attack
from carso_training.attacks.attack import Scores
from carso_training.attacks.model import attacked_in_eval_mode
from carso_training.datasets.examples import Examples
from carso_training.fitting.loop import fit
from carso_training.networks import Classifier, build_classifier
from carso_training.recipe import Recipe

VALIDATION_BATCH = 2500


def train_undefended(
    fabric: Fabric, recipe: Recipe, *, train: Examples, held_out: Examples, folder: Path
) -> Classifier:
    """Train a classifier on clean images only: the table's column `none`. Raises what `fit` does.

    `held_out` is never trained on; the figures of each epoch come from it.
    """

    def batch_loss(model: nn.Module, rows: Tensor, generator: torch.Generator, done: float) -> dict[str, Tensor]:
        return {"loss": _distance(model(train.pixels(rows)), train.labels[rows]).mean()}

    torch.manual_seed(recipe.seed)
    return fit(
        fabric,
        build_classifier(recipe.classifier),
        title="undefended classifier",
        folder=folder,
        rows=len(train),
        schedule=recipe.undefended,
        seed=recipe.seed,
        batch_loss=batch_loss,
        validate=lambda model: {CLEAN.name: accuracy(model, held_out.pixels(), held_out.labels)},
    )


def train_adversarial(
    fabric: Fabric, recipe: Recipe, *, train: Examples, held_out: Examples, folder: Path
) -> Classifier:
    """Train the IAT classifier. Raises what `fit` does.

    `held_out` is never trained on; the figures of each epoch come from it.
    """
    versions = [attack.name for attack in (CLEAN, *recipe.attacks)]
    shares = torch.tensor([recipe.foreseen[name] for name in versions], device=fabric.device)
    shares = shares / shares.sum()

    torch.manual_seed(recipe.seed)
    network = build_classifier(recipe.classifier)

    def batch_loss(model: nn.Module, rows: Tensor, generator: torch.Generator, done: float) -> dict[str, Tensor]:
        images, labels = train.pixels(rows), train.labels[rows]
        with attacked_in_eval_mode(network):  # not `model`: a distributed wrapper would wait for gradients
            attacked = attacked_together(
                network,
                recipe.attacks,
                images,
                labels,
                steps=recipe.training_attack_steps,
                generator=generator,
            )
        everything = torch.cat([images, attacked])
        distances = _distance(model(everything), labels.repeat(len(versions)))
        per_version = distances.view(len(versions), -1).mean(dim=1)
        losses = {f"loss_{name}": loss for name, loss in zip(versions, per_version, strict=True)}
        return {"loss": per_version @ shares} | losses

    def validate(model: nn.Module) -> dict[str, float]:
        return own_attack_accuracies(model, recipe.attacks, held_out, seed=recipe.seed)

    return fit(
        fabric,
        network,
        title="IAT classifier",
        folder=folder,
        rows=len(train),
        schedule=recipe.adversarial,
        seed=recipe.seed + 1,
        batch_loss=batch_loss,
        validate=validate,
    )


def attacked_together(
    scores: Scores,
    attacks: Sequence[Attack],
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Return the images [B, ...] under each attack, in the order of `attacks`: [len(attacks) * B, ...].

    Attacks of one method are made in one batch, in the form that the method has for training, with `steps` steps.
    """
    made: dict[Attack, Tensor] = {}
    for method in dict.fromkeys(attack.method for attack in attacks):
        alike = [attack for attack in attacks if attack.method is method]
        eps = torch.tensor([attack.eps for attack in alike], device=images.device).repeat_interleave(len(images))
        eps = eps.view(-1, *[1] * (images.dim() - 1))
        together = method.make(
            scores,
            images.repeat(len(alike), *[1] * (images.dim() - 1)),
            labels.repeat(len(alike)),
            eps=eps,
            generator=generator,
            **method.in_training(eps, steps),
        )
        made |= dict(zip(alike, together.split(len(images)), strict=True))
    return torch.cat([made[attack] for attack in attacks])


def own_attack_accuracies(
    model: nn.Module, attacks: Sequence[Attack], data: Examples, *, seed: int
) -> dict[str, float]:
    """Return the share of images that a classifier gets right, clean and under each attack on this very classifier."""
    device = data.images.device
    images, labels = data.pixels(), data.labels
    generator = torch.Generator(device).manual_seed(seed)
    with attacked_in_eval_mode(model):
        return {
            attack.name: accuracy(model, attack.images(model, images, labels, generator=generator), labels)
            for attack in (CLEAN, *attacks)
        }


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of `images` [N, ...] in [0, 1] that a classifier in eval mode gets right, in [0, 1]."""
    parts = zip(images.split(VALIDATION_BATCH), labels.split(VALIDATION_BATCH), strict=True)
    return sum((model(x).argmax(dim=1) == y).sum().item() for x, y in parts) / len(labels)


def _distance(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Squared L2 distance between softmax output and one-hot label, per row: [B] in [0, 2]."""
    one_hot = F.one_hot(labels, log_probs.shape[1])
    return (log_probs.float().exp() - one_hot).square().sum(dim=1)
