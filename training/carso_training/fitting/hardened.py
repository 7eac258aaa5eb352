"""Hardening: all networks of CARSO trained together against the attacker who differentiates through all of them.

The published recipe trains the purifier on attacks on its classifier only. An attacker who knows the purifier too
finds the whole system weaker than the classifier alone. Here each batch is seen three times: clean; attacked through
both passes (first pass, code, one latent, purified image, second pass); and, for a part of it, attacked on the first
pass alone, which defends the fast path and covers transfer attacks. The second pass becomes a classifier of its own.

The loss is the cross-entropy of the second pass on all these images, plus `pixel` times the pixelwise binary
cross-entropy of the purified images against the clean ones (summed over pixels), plus `first` times the cross-entropy
of the first pass. Attacks take gradients of the raw scores: see `networks/system.py`.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from carso_training.attacks.attack import Scores
from carso_training.attacks.linf import climb, random_start
from carso_training.datasets.examples import Examples
from carso_training.fitting.loop import fit
from carso_training.fitting.purifier import multiplies_bf16
from carso_training.networks import Classifier, Purifier, build_classifier
from carso_training.networks.system import System
from carso_training.recipe import Recipe, Strengths

LIKELY = 3  # a targeted attack goes for one of this many most likely other classes
STRETCH = 2.5  # the steps of an attack add up to this many times eps
VALIDATION_IMAGES = 500
VALIDATION_STEPS = 20
VALIDATION_EPS = (0.15, 0.30)


class Hardened(nn.Module):
    """The networks that are trained together. Of the purifier, only the code encoder and the decoder are."""

    def __init__(self, *, classifier: Classifier, purifier: Purifier, second_pass: Classifier) -> None:
        super().__init__()
        self.classifier, self.purifier, self.second_pass = classifier, purifier, second_pass

    def forward(self, images: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, *shape] and latents [B, latent] -> what the loss is made of.

        That is the log-probabilities [B, classes] of the first pass, the logits [B, *shape] of the purified images'
        pixels, and the log-probabilities of the second pass.
        """
        first = self.classifier.represent(images)
        pixels = self.purifier.decode_logits(self.purifier.encode(first.representation), latents)
        return first.log_probs, pixels, self.second_pass(torch.sigmoid(pixels))

    def system(self) -> System:
        """Return a copy of the system as it is now, in eval mode with frozen weights: what an attack differentiates."""
        copy = deepcopy(self)
        return System(classifier=copy.classifier, purifier=copy.purifier, second_pass=copy.second_pass)


def harden(
    fabric: Fabric,
    recipe: Recipe,
    *,
    classifier: Classifier,
    purifier: Purifier,
    train: Examples,
    held_out: Examples,
    folder: Path,
) -> Hardened:
    """Train a classifier and its purifier on, and the classifier that votes: the second pass.

    The recipe must have a `hardening`. The networks given are not changed. `held_out` is never trained on; the figures
    of each epoch come from it: the accuracy of single votes, clean and under a quick attack. These are signs of
    progress and not results. Raises what `fit` does.
    """
    hardening = recipe.hardening
    assert hardening is not None
    second_pass = begun_second_pass(recipe, classifier)
    network = _prepared(classifier, purifier, second_pass, first_pass=hardening.train_first_pass)
    held_out = held_out[slice(VALIDATION_IMAGES)]
    bf16 = recipe.purification_bf16 and multiplies_bf16(fabric.device)

    def batch_loss(model: nn.Module, rows: Tensor, generator: torch.Generator, done: float) -> dict[str, Tensor]:
        images, labels = train.moved(rows, by=recipe.shifts, generator=generator), train.labels[rows]
        count, also = len(images), min(hardening.first_pass_images, len(images))
        # not `model`: a distributed wrapper would wait for gradients
        system = network.system().to(torch.bfloat16 if bf16 else torch.float32)
        attacked = attacked_images(
            _one_vote(system, count, generator),
            images,
            labels,
            eps=strengths(hardening.eps, count, generator),
            steps=hardening.steps,
            generator=generator,
        )
        attacked_first = attacked_images(
            _in_own_dtype(system, system.classifier_scores()),
            images[:also],
            labels[:also],
            eps=strengths(hardening.first_pass_eps, also, generator),
            steps=hardening.steps,
            generator=generator,
        )
        everything = torch.cat([images, attacked, attacked_first])
        clean = torch.cat([images, images, images[:also]])
        truth = torch.cat([labels, labels, labels[:also]])
        latents = torch.randn(len(everything), system.latent, generator=generator, device=images.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            first, pixels, second = model(everything, latents)
        vote = F.nll_loss(second.float(), truth, reduction="none").split([count, count, also])
        own = F.nll_loss(first.float(), truth, reduction="none").split([count, count, also])
        loss_clean, loss_attacked, loss_transfer = vote[0].mean(), vote[1].mean(), vote[2].mean()
        loss_first = own[0].mean() + own[2].mean()
        loss_pixels = F.binary_cross_entropy_with_logits(pixels.float(), clean, reduction="sum") / len(clean)
        return {
            "loss": loss_clean
            + loss_attacked
            + loss_transfer * also / count
            + hardening.pixel * loss_pixels
            + hardening.first * loss_first,
            "loss_clean": loss_clean,
            "loss_attacked": loss_attacked,
            "loss_transfer": loss_transfer,
            "loss_first": loss_first,
            "loss_pixels": loss_pixels,
        }

    def validate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Hardened)
        return _quick_look(model, held_out, seed=recipe.seed)

    return fit(
        fabric,
        network,
        title="hardening",
        folder=folder,
        rows=len(train),
        schedule=hardening.schedule,
        seed=recipe.seed + 3,
        batch_loss=batch_loss,
        validate=validate,
    )


def attacked_images(
    scores: Scores, images: Tensor, labels: Tensor, *, eps: Tensor, steps: int, generator: torch.Generator
) -> Tensor:
    """Return images [B, *shape] in [0, 1] and within `eps` [B, 1, 1, 1] of `images`, from PGD with a random start.

    About half of them are driven away from their class, by its cross-entropy. The others are driven towards one of the
    most likely other classes, by the difference of its score and their own.
    """
    start = random_start(images, eps, generator=generator)
    row = torch.arange(len(images), device=images.device)
    with torch.no_grad():
        others = scores(start).float()
        others[row, labels] = -torch.inf
        likely = others.topk(min(LIKELY, others.shape[1] - 1)).indices
    rank = torch.randint(likely.shape[1], labels.shape, generator=generator, device=images.device)
    goal = likely[row, rank]
    targeted = torch.rand(labels.shape, generator=generator, device=images.device) < 0.5

    def loss(x: Tensor) -> Tensor:
        raw = scores(x).float()
        away = F.cross_entropy(raw, labels, reduction="none")
        return torch.where(targeted, raw[row, goal] - raw[row, labels], away)

    return climb(loss, start, images, eps=eps, steps=steps, step_size=STRETCH * eps / steps)


def begun_second_pass(recipe: Recipe, classifier: Classifier) -> Classifier:
    """Return the classifier that votes, as it is before hardening: `classifier` again, or the recipe's, untrained."""
    if recipe.second_pass is None:
        return deepcopy(classifier)
    torch.manual_seed(recipe.seed + 3)
    return build_classifier(recipe.second_pass).to(next(classifier.parameters()).device).eval()


def _prepared(classifier: Classifier, purifier: Purifier, second_pass: Classifier, *, first_pass: bool) -> Hardened:
    """Put networks into one, of which all that is used online is to be trained. The first two are copied.

    `first_pass`: whether the first pass is to be trained, too.
    """
    network = Hardened(
        classifier=deepcopy(classifier), purifier=deepcopy(purifier), second_pass=second_pass
    ).requires_grad_(True)
    network.classifier.requires_grad_(first_pass)
    network.purifier.requires_grad_(False)
    for part in (network.purifier.code_encoder, network.purifier.decoder):
        part.requires_grad_(True)
    for module in network.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0  # attacked images vary enough, and noise would blur what they have to teach
    return network


def _in_own_dtype(system: System, scores: Scores) -> Scores:
    """Let `scores` of a system in another dtype take images in float32."""
    dtype = next(system.parameters()).dtype
    return lambda images: scores(images.to(dtype))


def _one_vote(system: System, count: int, generator: torch.Generator) -> Scores:
    """Return the raw scores of one vote on each of `count` images; each image keeps its latent."""
    latents = torch.randn(count, system.latent, generator=generator, device=generator.device)
    return _in_own_dtype(system, lambda images: system(images, latents.to(images.dtype))[0][0])


def strengths(drawn: Strengths, count: int, generator: torch.Generator) -> Tensor:
    """Draw the eps of the attack on each of `count` images: [count, 1, 1, 1]."""
    eps, shares = (torch.tensor(part, device=generator.device) for part in zip(*drawn, strict=True))
    return eps[torch.multinomial(shares, count, replacement=True, generator=generator)].view(-1, 1, 1, 1)


def _quick_look(network: Hardened, data: Examples, *, seed: int) -> dict[str, float]:
    """Return the accuracy of one vote per image on fresh latents, clean and under a quick adaptive attack."""
    images, labels = data.pixels(), data.labels
    generator = torch.Generator(images.device).manual_seed(seed)
    system = network.system()
    seen = {"clean": images} | {
        f"adaptive-{eps:.2f}": attacked_images(
            _one_vote(system, len(images), generator),
            images,
            labels,
            eps=torch.full((len(images), 1, 1, 1), eps, device=images.device),
            steps=VALIDATION_STEPS,
            generator=generator,
        )
        for eps in VALIDATION_EPS
    }
    figures = {}
    for name, given in seen.items():
        latents = torch.randn(len(given), system.latent, generator=generator, device=given.device)
        with torch.no_grad():
            votes = system(given, latents)[1][0].argmax(dim=1)
        figures[name] = (votes == labels).float().mean().item()
    return figures
