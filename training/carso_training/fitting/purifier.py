"""Training the purifier: a conditional VAE that gives the clean image back from a clean or attacked one.

It sees the image and the frozen classifier's representation of it, and no labels. Loss: pixelwise binary cross-entropy
against the clean image plus KL divergence. Each is summed (over pixels, over latents), then averaged over the batch.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from carso_training.attacks import CLEAN
from carso_training.attacks.model import attacked_in_eval_mode
from carso_training.datasets.examples import Examples
from carso_training.fitting.attacked import make
from carso_training.fitting.loop import fit
from carso_training.networks import Classifier, Purifier, build_purifier
from carso_training.recipe import Recipe

log = logging.getLogger(__name__)

VALIDATION_IMAGES = 1000  # per epoch and version: a progress figure (+- 1 %), not the measured table
VALIDATION_VOTES = 9


def train_purifier(
    fabric: Fabric, recipe: Recipe, classifier: Classifier, *, train: Examples, held_out: Examples, folder: Path
) -> Purifier:
    """Train the purifier of a classifier, which is frozen. Raises what `fit` does.

    `held_out` is never trained on; the figures of each epoch come from it. The attacked versions of `train` are kept
    in ``folder/attacked``.
    """
    torch.manual_seed(recipe.seed)
    network = build_purifier(recipe.purifier)
    bf16 = recipe.purification_bf16 and multiplies_bf16(fabric.device)
    if recipe.purification_bf16 and not bf16:
        log.info("purifier: in float32, since this %s does not multiply bfloat16 itself", fabric.device.type.upper())
    classifier.requires_grad_(False).eval()
    versions = make(fabric, classifier, recipe.attacks, train, folder=folder / "attacked", seed=recipe.seed)
    held_out = held_out[slice(VALIDATION_IMAGES)]
    with attacked_in_eval_mode(classifier):
        seen = {
            attack.name: attack.images(
                classifier,
                held_out.pixels(),
                held_out.labels,
                generator=torch.Generator(fabric.device).manual_seed(recipe.seed),
            )
            for attack in (CLEAN, *recipe.attacks)
        }

    def batch_loss(model: nn.Module, rows: Tensor, generator: torch.Generator, done: float) -> dict[str, Tensor]:
        images = versions.batch(rows)
        target = images[0].flatten(1).repeat(len(images), 1)
        images = images.flatten(0, 1)
        noise = torch.randn(len(images), recipe.purifier.latent, generator=generator, device=images.device)
        with torch.autocast(fabric.device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                representation = classifier.represent(images).representation
            output = model(images, representation, noise)
        mean, log_variance = output.mean.float(), output.log_variance.float()
        reconstruction = F.binary_cross_entropy_with_logits(output.logits.float(), target, reduction="sum")
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        reconstruction, divergence = reconstruction / len(images), divergence / len(images)
        return {"loss": reconstruction + divergence, "reconstruction": reconstruction, "divergence": divergence}

    def validate(model: nn.Module) -> dict[str, float]:
        return {
            name: (majority(classifier, model, images, seed=recipe.seed) == held_out.labels).float().mean().item()
            for name, images in seen.items()
        }

    return fit(
        fabric,
        network,
        title="purifier",
        folder=folder,
        rows=len(train),
        schedule=recipe.purification,
        seed=recipe.seed + 2,
        batch_loss=batch_loss,
        validate=validate,
    )


def multiplies_bf16(device: torch.device) -> bool:
    """Tell whether a device has bfloat16 matrix products of its own.

    On a CPU without them (x86 with AVX2 only) PyTorch runs reference loops, up to a hundred times slower than float32:
    measured on a Zen 3, 184 ms against 2 ms for 256 x 784 x 512.
    """
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


@torch.no_grad()
def majority(classifier: Classifier, purifier: nn.Module, images: Tensor, *, seed: int) -> Tensor:
    """Return the winning class [B] of a few votes per image: a sketch of the pipeline, to follow training by."""
    assert isinstance(purifier, Purifier)
    generator = torch.Generator(images.device).manual_seed(seed)
    codes = purifier.encode(classifier.represent(images).representation)
    latents = torch.randn(
        VALIDATION_VOTES, len(images), purifier.config.latent, generator=generator, device=images.device
    )
    votes = torch.stack([classifier(purifier.decode(codes, latent)).argmax(dim=1) for latent in latents])
    return votes.mode(dim=0).values
