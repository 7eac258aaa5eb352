"""Training the classifier: undefended, and by iterative adversarial training (IAT).

The loss is the squared L2 distance between softmax output and one-hot label, on the clean batch and on its
attacked versions: FGSM and PGD at eps 0.15 and 0.30, made anew on the network as it is at each step.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from carso_training.attacks import CLEAN, FORESEEN, attack_images, attacked_in_eval_mode, fgsm, pgd
from carso_training.data import Dataset
from carso_training.loop import fit
from carso_training.networks import Classifier
from carso_training.recipe import Recipe

VALIDATION_BATCH = 2500


def train_undefended(fabric: Fabric, recipe: Recipe, train: Dataset, held_out: Dataset, *, folder: Path) -> Classifier:
    """The classifier on clean images only: the table's column `none`."""

    def batch_loss(model: nn.Module, rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": _distance(model(train.pixels(rows)), train.labels[rows]).mean()}

    torch.manual_seed(recipe.seed)
    return fit(
        fabric,
        Classifier(recipe.classifier),
        title="undefended classifier",
        folder=folder,
        rows=len(train),
        schedule=recipe.undefended,
        seed=recipe.seed,
        batch_loss=batch_loss,
        validate=lambda model: {CLEAN.name: accuracy(model, held_out.pixels(), held_out.labels)},
    )


def train_adversarial(fabric: Fabric, recipe: Recipe, train: Dataset, held_out: Dataset, *, folder: Path) -> Classifier:
    """The IAT classifier."""
    weights = recipe.adversarial_weights
    shares = torch.tensor(
        [weights.clean, weights.fgsm_15, weights.fgsm_30, weights.pgd_15, weights.pgd_30], device=fabric.device
    )
    shares = shares / shares.sum()

    torch.manual_seed(recipe.seed)
    network = Classifier(recipe.classifier)

    def batch_loss(model: nn.Module, rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        images, labels = train.pixels(rows), train.labels[rows]
        with attacked_in_eval_mode(network):  # not `model`: a distributed wrapper would wait for gradients
            twice, labels_twice = images.repeat(2, 1, 1, 1), labels.repeat(2)
            eps = torch.tensor([0.15, 0.30], device=images.device).repeat_interleave(len(images)).view(-1, 1, 1, 1)
            step_size = 2.5 * eps / recipe.training_pgd_steps
            by_fgsm = fgsm(network, twice, labels_twice, eps=eps)
            by_pgd = pgd(
                network,
                twice,
                labels_twice,
                eps=eps,
                steps=recipe.training_pgd_steps,
                step_size=step_size,
                generator=generator,
            )
        everything = torch.cat([images, by_fgsm, by_pgd])
        per_version = _distance(model(everything), labels.repeat(5)).view(5, -1).mean(dim=1)
        return {"loss": per_version @ shares, "loss_clean": per_version[0], "loss_pgd_30": per_version[4]}

    def validate(model: nn.Module) -> dict[str, float]:
        return own_attack_accuracies(model, held_out, seed=recipe.seed)

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


def own_attack_accuracies(model: nn.Module, data: Dataset, *, seed: int) -> dict[str, float]:
    """Accuracy on clean images and on the foreseen attacks on this very classifier."""
    device = data.images.device
    images, labels = data.pixels(), data.labels
    generator = torch.Generator(device).manual_seed(seed)
    with attacked_in_eval_mode(model):
        return {
            attack.name: accuracy(model, attack_images(model, attack, images, labels, generator=generator), labels)
            for attack in (CLEAN, *FORESEEN)
        }


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of `images` [N, ...] in [0, 1] that the classifier, in eval mode, gets right."""
    parts = zip(images.split(VALIDATION_BATCH), labels.split(VALIDATION_BATCH), strict=True)
    return sum((model(x).argmax(dim=1) == y).sum().item() for x, y in parts) / len(labels)


def _distance(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Squared L2 distance between softmax output and one-hot label, per row: [B] in [0, 2]."""
    one_hot = F.one_hot(labels, log_probs.shape[1])
    return (log_probs.float().exp() - one_hot).square().sum(dim=1)
