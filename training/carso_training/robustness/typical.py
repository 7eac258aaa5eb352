"""Which images are typical of a bundle: its thresholds, and what they flag.

The thresholds are set on validation images, clean and attacked, that the vote reads rightly: each leaves out one in 400
of them. What they flag is then measured on test images, on changed ones, and on images of something else. The figures
are those of the pipeline that ships (``carso.inference.typical``).

An attacker who knows of the test can aim at it. `evading` does: it drives an image away from its class, and pays for
every excess above the threshold. Several prices are tried, and an image counts as missed if one of them works.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from carso.bundle import Bundle, Judged, Typical
from torch import Tensor

from carso_training.attacks import Attack
from carso_training.attacks.linf import climb, random_start
from carso_training.attacks.pgd import PGD
from carso_training.datasets import DATASETS
from carso_training.datasets.examples import Examples
from carso_training.errors import DataUnavailableError
from carso_training.fitting.hardened import STRETCH, attacked_images
from carso_training.networks.system import System
from carso_training.robustness.system import recipe_of, system_of
from carso_training.robustness.voting import pipeline_of, robust_results, vote_seeds

LEFT_OUT = 0.0025  # of the images that each threshold is set on
STEPS = 40  # of attacks that see all of the system
PRICES = (1.0, 10.0, 100.0)  # of an excess as large as the threshold, in units of the margin of the raw scores
MARGIN = 0.9  # the share of the threshold from which on an evading attack pays
BATCH = 500  # images attacked at once
VALIDATION_IMAGES = 2000
TEST_IMAGES = 1000
RISK = 1e-3

log = logging.getLogger(__name__)

Change = Callable[[Tensor], Tensor]


def _checks(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    return ((rows + columns) % 2).expand_as(images).float()


def _gradient(images: Tensor) -> Tensor:
    return torch.linspace(0, 1, images.shape[3]).expand_as(images).clone()


def _half_size(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    small = F.interpolate(images, (height // 2, width // 2), mode="bilinear", antialias=True)
    top, left = (height - small.shape[2]) // 2, (width - small.shape[3]) // 2
    return F.pad(small, (left, width - left - small.shape[3], top, height - top - small.shape[2]))


# Images that are of the class they were of, and yet not as the purifier knows them
CHANGED: dict[str, Change] = {
    "faint (values x 0.3)": lambda images: images * 0.3,
    "moved by a fifth": lambda images: images.roll((images.shape[2] // 5, images.shape[3] // 5), (2, 3)),
    "half size": _half_size,
    "turned by 90 degrees": lambda images: images.rot90(1, (2, 3)),
    "bold strokes": lambda images: F.max_pool2d(images, 3, stride=1, padding=1),
}
# Images of nothing, or that somebody made a mistake with
NOTHING: dict[str, Change] = {
    "inverted": lambda images: 1 - images,
    "white": torch.ones_like,
    "grey": lambda images: torch.full_like(images, 0.5),
    "black": torch.zeros_like,
    "checks": _checks,
    "gradient": _gradient,
    "values scaled twice": lambda images: images / 255,
    "uint8 of 0 and 1": lambda images: (images > 0.5).float() / 255,
}


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    """What the pipeline says of N images."""

    labels: np.ndarray  # [N] int64
    typical: np.ndarray  # [N] bool
    excess: np.ndarray  # [N]
    contrast: np.ndarray  # [N]


class Typicalities:
    """Thresholds and tables of one bundle."""

    def __init__(self, bundle: Bundle, *, eps: float, seed: int, device: torch.device) -> None:
        """`eps`: how far an attacker may move a value. `seed` decides attacks, noise and latents. `device`: where
        attacks are made. Raises DeviceError if the bundle's graphs do not run.
        """
        self.eps, self._seed, self._device = eps, seed, device
        self._samples = bundle.manifest.samples
        self._system: System = system_of(bundle).to(device)
        self._pipeline = pipeline_of(bundle, eps=eps)
        self._anything = Typical(eps=eps, excess=1e9, contrast=0)

    def thresholds(self, validation: Examples) -> Typical:
        """Set the thresholds on `validation`, which must be images that nothing was trained on. The table is empty.

        If the vote reads none of them rightly, every image is typical.
        """
        generator = self._generator(0)
        right = []
        for part in _batches(validation):
            wanted = part.labels.cpu().numpy()
            for images in (part.pixels(), *self._attacked(part, generator).values()):
                verdict = self._judge(images, self._anything)
                known = verdict.labels == wanted
                right.append(np.stack([verdict.excess[known], verdict.contrast[known]]))
        excess, contrast = np.concatenate(right, axis=1)
        if not len(excess):
            return self._anything
        return Typical(
            eps=self.eps,
            excess=round(float(np.quantile(excess, 1 - LEFT_OUT)), 6),
            contrast=round(float(np.quantile(contrast, LEFT_OUT)), 6),
        )

    def table(self, bounds: Typical, test: Examples, others: Mapping[str, Examples]) -> tuple[Judged, ...]:
        """Measure what thresholds flag among `test` images, changed ones, and `others`: images of other things."""
        generator = self._generator(1)
        counted: dict[str, Judged] = {}

        def count(kind: str, verdict: _Verdict, labels: Tensor | None) -> None:
            missed = None
            if labels is not None:
                missed = int((verdict.typical & (verdict.labels != labels.cpu().numpy())).sum())
            found = Judged(
                kind=kind, images=len(verdict.labels), untypical=int((~verdict.typical).sum()), missed=missed
            )
            counted[kind] = _added(counted[kind], found) if kind in counted else found

        for part in _batches(test):
            images, labels = part.pixels(), part.labels
            count("clean", self._judge(images, bounds), labels)
            noise = (2 * torch.rand(images.shape, generator=generator, device=images.device) - 1) * self.eps
            count(f"noise of {self.eps:.2f}", self._judge((images + noise).clamp(0, 1), bounds), labels)
            for kind, attacked in self._attacked(part, generator).items():
                count(kind, self._judge(attacked, bounds), labels)
            for eps in (self.eps, min(1.0, self.eps + 0.2)):
                count(f"aimed at this test {eps:.2f}", self._evaded(part, bounds, eps, generator), labels)
            for kind, change in CHANGED.items():
                count(kind, self._judge(change(images.cpu()), bounds), labels)
            for kind, change in NOTHING.items():
                count(kind, self._judge(change(images.cpu()), bounds), None)
            count("random values", self._judge(torch.rand(images.shape, generator=torch.manual_seed(0)), bounds), None)
        for kind, data in others.items():
            for part in _batches(data):
                count(kind, self._judge(part.pixels(), bounds), None)
        return tuple(counted.values())

    def _attacked(self, data: Examples, generator: torch.Generator) -> dict[str, Tensor]:
        """Images attacked on the first pass alone, and through all of the system, at half of eps and at eps."""
        images, labels = data.pixels().to(self._device), data.labels.to(self._device)
        found: dict[str, Tensor] = {}
        for eps in (self.eps / 2, self.eps):
            transfer = Attack(PGD, eps)
            scores = self._system.classifier_scores()
            found[f"transfer {transfer.name}"] = transfer.images(scores, images, labels, generator=generator)
        for eps in (self.eps / 2, self.eps):
            found[f"adaptive pgd-{eps:.2f}"] = attacked_images(
                self._system.fresh("logits", votes=1, generator=generator),
                images,
                labels,
                eps=torch.full((len(images), 1, 1, 1), eps, device=self._device),
                steps=STEPS,
                generator=generator,
            )
        return found

    def _evaded(self, data: Examples, bounds: Typical, eps: float, generator: torch.Generator) -> _Verdict:
        """Judge the images of the best price for each: the first that is typical and misread."""
        images, labels = data.pixels().to(self._device), data.labels.to(self._device)
        wanted = data.labels.cpu().numpy()
        best: _Verdict | None = None
        for price in PRICES:
            made = evading(
                self._system, images, labels, eps=eps, bounds=bounds, price=price, steps=STEPS, generator=generator
            )
            found = self._judge(made, bounds)
            if best is None:
                best = found
                continue
            better = found.typical & (found.labels != wanted)
            best = _Verdict(
                labels=np.where(better, found.labels, best.labels),
                typical=np.where(better, found.typical, best.typical),
                excess=np.where(better, found.excess, best.excess),
                contrast=np.where(better, found.contrast, best.contrast),
            )
        assert best is not None
        return best

    def _judge(self, images: Tensor, bounds: Typical) -> _Verdict:
        pixels = images.cpu().numpy()
        seeds = vote_seeds(len(pixels), seed=self._seed, part=0)
        results = robust_results(self._pipeline, pixels, samples=self._samples, risk=RISK, seeds=seeds)
        figures = [result.typicalities[0] for result in results if result.typicalities]
        return _Verdict(
            labels=np.array([result.outcomes[0].label for result in results], np.int64),
            typical=np.array([bounds.admits(excess=each.excess, contrast=each.contrast) for each in figures], bool),
            excess=np.array([each.excess for each in figures]),
            contrast=np.array([each.contrast for each in figures]),
        )

    def _generator(self, part: int) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(2 * self._seed + part)


def typical_of(
    bundle: Bundle, *, validation: Examples, test: Examples, seed: int, device: torch.device, given: Path | None = None
) -> Typical:
    """Set a bundle's thresholds on the first `validation` images and measure them on the first `test` images.

    How far an attacker may move a value is the largest eps among the attacks that the bundle's recipe foresees.
    `given`: a folder of the user's with other data sets; one that cannot be had is left out of the table. Raises
    RecipeError if the manifest holds no recipe of this release, and DeviceError if the graphs do not run.
    """
    recipe = recipe_of(bundle)
    eps = max(attack.eps for attack in recipe.attacks)
    measuring = Typicalities(bundle, eps=eps, seed=seed, device=device)
    bounds = measuring.thresholds(validation[slice(VALIDATION_IMAGES)])
    test = test[slice(TEST_IMAGES)]
    others: dict[str, Examples] = {}
    for name, data in DATASETS.items():
        if name != recipe.dataset and data.input_shape == recipe.data.input_shape:
            try:
                others[name] = data.load("test", given=given)[slice(len(test))]
            except DataUnavailableError as e:
                log.warning("the table of typical images goes without %s: %s", name, e)
    table = measuring.table(bounds, test, others)
    return bounds.model_copy(update={"table": table})


def evading(
    system: System,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    bounds: Typical,
    price: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Return images [B, *shape] in [0, 1] and within `eps` of `images` that are to be misread and yet typical.

    Each step ascends, by the sign of the gradient, the margin of the most likely other class over the true one, in raw
    scores of one fresh vote, less `price` times the part of the excess that is above MARGIN of the threshold, in units
    of the threshold.
    """
    row = torch.arange(len(images), device=images.device)
    zeros = torch.zeros(len(images), system.latent, device=images.device)
    allowed = max(bounds.excess, 1e-6)

    def loss(x: Tensor) -> Tensor:
        latents = torch.randn(len(images), system.latent, generator=generator, device=images.device)
        codes = system.encode(x)[1]
        raw = system.vote(codes, latents)[0][0]
        others = raw.clone()
        others[row, labels] = -inf
        margin = others.max(dim=1).values - raw[row, labels]
        distance = (system.decoder(codes, row, zeros) - x).abs()
        excess = (distance - bounds.eps).clamp(min=0).flatten(1).mean(dim=1)
        return margin - price * (excess / allowed - MARGIN).clamp(min=0)

    start = random_start(images, eps, generator=generator)
    return climb(loss, start, images, eps=eps, steps=steps, step_size=STRETCH * eps / steps)


def as_markdown(typical: Typical) -> str:
    """Return the thresholds and the table in Markdown."""
    lines = [
        f"Typical: an excess of at most {typical.excess:g} beyond eps {typical.eps:g}, and a contrast of at least "
        f"{typical.contrast:g}.",
        "",
        "| images of this kind | how many | not typical, % | typical, and yet misread, % |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in typical.table:
        missed = "-" if row.missed is None else f"{100 * row.missed / row.images:.1f}"
        lines.append(f"| {row.kind} | {row.images} | {100 * row.untypical / row.images:.1f} | {missed} |")
    return "\n".join(lines)


def _batches(data: Examples) -> Iterator[Examples]:
    for start in range(0, len(data), BATCH):
        yield data[slice(start, start + BATCH)]


def _added(one: Judged, other: Judged) -> Judged:
    missed = None if one.missed is None or other.missed is None else one.missed + other.missed
    return Judged(
        kind=one.kind, images=one.images + other.images, untypical=one.untypical + other.untypical, missed=missed
    )
