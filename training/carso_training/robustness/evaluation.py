"""Measuring a bundle: which images, which protocols, at which strengths; and the figures that come of it.

<out>/<protocol>-<defence>-linf-<eps>.json   a figure each (`figures.py`)
<out>/sanity.json
<out>/work/                                  every batch of every attack: what a stopped measurement resumes from
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from carso.bundle import Bundle, Cell, Threat
from torch import Tensor

from carso_training.datasets import dataset
from carso_training.datasets.examples import Examples
from carso_training.errors import RecipeError
from carso_training.robustness import figures
from carso_training.robustness.adaptive import adaptive_trials
from carso_training.robustness.campaign import Campaign, Outcome, Trial
from carso_training.robustness.effort import Effort
from carso_training.robustness.figures import Figure, Measured, Protocol, Split
from carso_training.robustness.judges import Counting, FastPath, Judge, RobustPath
from carso_training.robustness.strong import strong_trials
from carso_training.robustness.system import system_of
from carso_training.robustness.voting import pipeline_of

ROWS = {"cpu": 1024, "cuda": 65536}  # of networks' inputs to compute at once
MOST_IMAGES = {"cpu": 256, "cuda": 4096}  # attacked at once


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured: all that decides the figures of a bundle, but the machine."""

    split: Split
    images: int | None  # how many of the split's images, drawn at random; None: all
    seed: int  # decides the images, the attacks and the votes
    effort: Effort


class Evaluation:
    """One bundle under one plan. Every method resumes from what the folder holds."""

    def __init__(
        self, bundle: Bundle, *, data: Examples, plan: Plan, out: Path, device: torch.device, quiet: bool = False
    ) -> None:
        """`data`: the whole split, on the CPU. `device`: where attacks are made. `quiet`: no progress bar.

        Raises DeviceError if the bundle's graphs do not run, and OSError if `out` cannot be written.
        """
        self.bundle, self.data, self.plan, self.out, self.device, self.quiet = bundle, data, plan, out, device, quiet
        self.rows = subset(len(data), images=plan.images, seed=plan.seed)
        self.system = system_of(bundle).to(device)
        self.pipeline = pipeline_of(bundle)
        out.mkdir(parents=True, exist_ok=True)

    @property
    def measured(self) -> Measured:
        """What the figures are of."""
        whole = len(self.rows) == len(self.data)
        subset = f"all {len(self.data)}" if whole else f"{len(self.rows)} drawn at random, seed {self.plan.seed}"
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        return figures.measured(self.bundle, split=self.plan.split, subset=subset, device=device)

    def strong(self, strengths: Sequence[float], *, report: Callable[[Figure], None] = lambda figure: None) -> None:
        """Measure the classifier of the first pass, a figure for each eps."""

        def trials(eps: float) -> list[Trial]:
            return strong_trials(
                raw=self.system.classifier_scores(),
                scores=self.system.classifier_scores(raw=False),
                classes=self.system.classes,
                eps=eps,
                effort=self.plan.effort,
            )

        for eps in strengths:
            found = self._campaign("strong", eps, trials(eps), FastPath(self.pipeline), votes=1)
            report(self._figure("strong", "classifier", eps, found))

    def adaptive(
        self,
        strengths: Sequence[float],
        *,
        surrogate: Bundle | None = None,
        report: Callable[[Figure], None] = lambda figure: None,
    ) -> None:
        """Measure all of CARSO, a figure for each eps. `surrogate`: another bundle, whose attacks are tried too."""
        effort = self.plan.effort
        other = None if surrogate is None else system_of(surrogate).to(self.device)
        for eps in strengths:
            trials = adaptive_trials(self.system, eps=eps, effort=effort, surrogate=other)
            found = self._campaign(
                "adaptive",
                eps,
                trials,
                self.robust_path(),
                votes=effort.latents,
                surrogate=surrogate.checksum if surrogate else "",
            )
            report(self._figure("adaptive", "carso", eps, found))

    def robust_path(self) -> RobustPath:
        """The judge of all of CARSO."""
        return RobustPath(self.pipeline, counting=self.counting, seed=self.plan.seed, images=len(self.data))

    @property
    def counting(self) -> Counting:
        """How its votes are counted."""
        return Counting(samples=self.bundle.manifest.samples, draws=self.plan.effort.draws)

    def batch(self, votes: int) -> int:
        """Images to attack at once, where each takes `votes` rows of the networks."""
        return max(1, min(ROWS[self.device.type] // votes, MOST_IMAGES[self.device.type]))

    def _campaign(
        self, protocol: Protocol, eps: float, trials: Sequence[Trial], judge: Judge, *, votes: int, **more: str
    ) -> Outcome:
        campaign = Campaign(
            self.out / "work" / f"{protocol}-{eps:.2f}",
            data=self.data,
            rows=self.rows,
            eps=eps,
            judge=judge,
            seed=self.plan.seed,
            batch=self.batch(votes),
            belongs_to={
                "bundle": self.bundle.checksum,
                "split": self.plan.split,
                "effort": dataclasses.asdict(self.plan.effort),
                "counting": dataclasses.asdict(self.counting),
                "trials": [[trial.name, dict(trial.settings)] for trial in trials],
                **more,
            },
            device=self.device,
        )
        return campaign.run(trials, title=f"{protocol} eps {eps:.2f}", quiet=self.quiet)

    def _figure(self, protocol: Protocol, defence: str, eps: float, found: Outcome) -> Figure:
        settings = dataclasses.asdict(self.plan.effort)
        if protocol == "strong":
            settings = {name: value for name, value in settings.items() if not name.startswith(("latents", "draws"))}
        else:
            settings |= {"samples": self.counting.samples, "risk": self.counting.risk}
        threat = Threat(
            attack=protocol,
            norm="linf",
            eps=eps,
            sees="classifier" if protocol == "strong" else "system",
            settings=settings,
        )
        figure = Figure(
            protocol=protocol,
            measured=self.measured,
            cell=Cell(
                defence=defence,
                threat=threat,
                correct=int(found.survived.sum()),
                images=len(self.rows),
                published=None,
            ),
            clean=int(found.clean.sum()),
            trials=found.tried,
            seed=self.plan.seed,
            seconds=round(found.seconds, 1),
        )
        figures.write(self.out, figure)
        return figure


def images_of(bundle: Bundle, split: Split, *, given: Path | None = None) -> Examples:
    """Load the test images of a bundle's data set, or the validation images that its recipe held out, on the CPU.

    `given`: a folder with the data set's files. Raises DataUnavailableError, and RecipeError if the bundle's recipe
    does not say which images it held out.
    """
    data = dataset(bundle.manifest.dataset)
    if split == "test":
        return data.load("test", given=given)
    recipe = bundle.manifest.recipe
    try:
        held_out, seed = int(recipe["validation_images"]), int(recipe["seed"])
    except (KeyError, TypeError, ValueError) as e:
        raise RecipeError(f"the recipe in {bundle.folder} does not say which images it held out: {e!r}") from None
    return data.load("train", given=given).split(held_out=held_out, seed=seed)[1]


def subset(count: int, *, images: int | None, seed: int) -> Tensor:
    """Draw which of `count` images are measured: [images] int64, ascending, the same for every eps and system."""
    if images is None or images >= count:
        return torch.arange(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:images].sort().values
