"""Measuring a bundle: which images, which protocols, at which strengths; and the figures that come of it.

<out>/<protocol>-<defence>-linf-<eps>.json   a figure each (`figures.py`)
<out>/sanity.json                            the sanity checks (`sanity.py`)
<out>/strip.png                              some of the images (`strip.py`)
<out>/work/                                  every batch of every attack: what a stopped measurement resumes from
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from carso.bundle import Bundle, Cell, Sees, Threat
from torch import Tensor

from carso_training.datasets import dataset
from carso_training.datasets.examples import Examples
from carso_training.errors import RecipeError
from carso_training.networks.cost import costs
from carso_training.robustness import controls, figures, strip
from carso_training.robustness.adaptive import Voting, adaptive_trials, attacks_on_a_vote
from carso_training.robustness.blackbox import Service, ServiceJudge, blackbox_trials
from carso_training.robustness.campaign import Campaign, Outcome, Trial
from carso_training.robustness.effort import Effort
from carso_training.robustness.figures import Figure, Measured, Protocol, Settings, Split, Tried
from carso_training.robustness.judges import Counting, FastPath, Judge, RobustPath
from carso_training.robustness.strong import strong_trials
from carso_training.robustness.system import system_of
from carso_training.robustness.voting import pipeline_of

ROWS = {"cpu": 1024, "cuda": 65536}  # of networks' inputs to compute at once
MOST_IMAGES = {"cpu": 256, "cuda": 4096}  # attacked at once
RECOUNT = 1_000_003  # added to the seed for elections that judge images again

Report = Callable[[Figure], None]
"""Called with each figure as soon as it is written."""


def _unseen(figure: Figure) -> None:
    """Report nothing."""


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
        self,
        bundle: Bundle,
        *,
        data: Examples,
        plan: Plan,
        out: Path,
        device: torch.device,
        threads: int | None = None,
        quiet: bool = False,
    ) -> None:
        """`data`: the whole split, on the CPU. `device`: where attacks are made. `quiet`: no progress bar.

        `threads`: of votes on the CPU; None: one for each processor. PyTorch's own threads are the caller's to set.
        Raises DeviceError if the bundle's graphs do not run, and OSError if `out` cannot be written.
        """
        self.bundle, self.data, self.plan, self.out, self.device, self.quiet = bundle, data, plan, out, device, quiet
        self.threads = threads
        self.rows = subset(len(data), images=plan.images, seed=plan.seed)
        self.system = system_of(bundle).to(device)
        self.pipeline = pipeline_of(bundle, threads=threads)
        self.costs = costs(self.system, shape=bundle.manifest.input.shape)
        out.mkdir(parents=True, exist_ok=True)

    @property
    def measured(self) -> Measured:
        """What the figures are of."""
        whole = len(self.rows) == len(self.data)
        subset = f"all {len(self.data)}" if whole else f"{len(self.rows)} drawn at random, seed {self.plan.seed}"
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        return figures.measured(
            self.bundle, split=self.plan.split, subset=subset, device=device, multiply_adds=self.costs
        )

    def strong(self, strengths: Sequence[float], *, report: Report = _unseen) -> None:
        """Measure the classifier of the first pass, a figure for each eps."""
        for eps in strengths:
            trials = strong_trials(
                raw=self.system.classifier_scores(),
                scores=self.system.classifier_scores(raw=False),
                classes=self.system.classes,
                eps=eps,
                effort=self.plan.effort,
            )
            campaign = self._campaign("strong", eps, trials, FastPath(self.pipeline), votes=1)
            found = campaign.run(trials, title=f"strong eps {eps:.2f}", quiet=self.quiet)
            settings = {k: v for k, v in self.settings.items() if not k.startswith(("latents", "draws"))}
            report(self._figure("strong", "classifier", eps, found, settings=settings, sees="classifier"))

    def adaptive(
        self, strengths: Sequence[float], *, surrogate: Bundle | None = None, report: Report = _unseen
    ) -> None:
        """Measure all of CARSO, a figure for each eps. `surrogate`: another bundle, whose attacks are tried too."""
        for eps in strengths:
            _, found = self._adaptive(eps, surrogate)
            report(self._figure("adaptive", "carso", eps, found, settings=self._counted(self.counting)))

    def strip(self, eps: float, *, surrogate: Bundle | None = None) -> Path:
        """Draw some images of the adaptive attacks (`strip.py`), and return the file. Makes the attacks first.

        An image that no attack broke is shown as the first attack through all of CARSO left it.
        """
        campaign, _ = self._adaptive(eps, surrogate)
        attacked: dict[int, tuple[np.ndarray, bool]] = {}
        for made in campaign.made():
            for row, image, survived in zip(made.rows.tolist(), made.images, made.survived, strict=True):
                if made.trial and (not survived or made.name == "apgd-ce-logits"):
                    attacked[row] = (image, not survived)
        columns = [
            strip.Column(
                label=int(self.data.labels[row]),
                clean=self.data.pixels(torch.tensor([row]))[0].numpy(),
                attacked=image,
                fooled=fooled,
            )
            for row, (image, fooled) in sorted(attacked.items())
        ]
        path, manifest = self.out / "strip.png", self.bundle.manifest
        if picked := strip.chosen(columns):
            strip.write(
                path,
                picked,
                sessions=self.pipeline.sessions,
                latent=manifest.latent,
                names=manifest.classes,
                seed=self.plan.seed,
            )
        return path

    def controls(
        self,
        strengths: Sequence[float],
        *,
        validation: Examples,
        others: Sequence[Bundle] = (),
        surrogate: Bundle | None = None,
        report: Report = _unseen,
    ) -> None:
        """Measure simpler defences (`controls.py`), a figure for each and eps. Makes the adaptive attacks first.

        `validation`: images that smoothing chooses its noise on. `others`: bundles whose classifiers are controls.
        """
        for eps in strengths:
            self._recounts(eps, surrogate, report)
            zero = np.zeros((1, self.system.latent), np.float32)
            self._control(
                "one-zero-latent",
                eps,
                controls.Fixed(self.system, torch.from_numpy(zero).to(self.device)),
                controls.FixedVote(self.pipeline.sessions, zero, classes=self.system.classes),
                {"latents": 1, "draws": 1, "samples": 1},
                report,
                votes=1,
            )
            samples = self.counting.samples
            affordable = samples * self.costs["vote"] // self.costs["classifier"]
            chosen = self._best_noise(eps, validation)
            for name, noise, votes in (("noised-votes", controls.NOISE, samples), ("smoothing", chosen, affordable)):
                counting = replace(self.counting, samples=votes)
                settings = {**self._counted(counting), "noise": noise}
                if name == "smoothing":
                    settings["noise_chosen_on"] = f"{controls.VALIDATION_IMAGES} validation images"
                defence, judge = self._noised(noise, counting)
                self._control(name, eps, defence, judge, settings, report, votes=self.plan.effort.latents)
            for other in others:
                self._other(other, eps, report)

    def blackbox(self, strengths: Sequence[float], *, service: Service, queries: int, report: Report = _unseen) -> None:
        """Measure a running service that serves this bundle, by an attacker who sees labels only, one image after the
        other. Raises CarsoError if the service does not answer.
        """
        draws = self.plan.effort.draws
        for eps in strengths:
            trials = blackbox_trials(service, eps=eps, queries=queries)
            judge = ServiceJudge(service, draws=draws)
            campaign = self._campaign("blackbox", eps, trials, judge, votes=1, batch=1, answers=service.answers)
            found = campaign.run(trials, title=f"blackbox eps {eps:.2f}", quiet=self.quiet)
            settings: Settings = {"queries": queries, "draws": draws}
            report(self._figure("blackbox", "carso", eps, found, settings=settings, sees="answers"))

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

    @property
    def settings(self) -> Settings:
        """The effort, as a figure's settings."""
        found = dataclasses.asdict(self.plan.effort)
        return {"effort": found.pop("name"), **found}

    def _counted(self, counting: Counting) -> Settings:
        return {**self.settings, "samples": counting.samples, "risk": counting.risk}

    def _adaptive(self, eps: float, surrogate: Bundle | None) -> tuple[Campaign, Outcome]:
        other = None if surrogate is None else system_of(surrogate).to(self.device)
        trials = adaptive_trials(self.system, eps=eps, effort=self.plan.effort, surrogate=other)
        campaign = self._campaign(
            "adaptive",
            eps,
            trials,
            self.robust_path(),
            votes=self.plan.effort.latents,
            surrogate=figures.networks(surrogate) if surrogate else "",
        )
        return campaign, campaign.run(trials, title=f"adaptive eps {eps:.2f}", quiet=self.quiet)

    def _recounts(self, eps: float, surrogate: Bundle | None, report: Report) -> None:
        """Judge every image that the adaptive attacks made by one more election: of another size, or in int8."""
        campaign, adaptive = self._adaptive(eps, surrogate)
        batches = list(campaign.made())
        int8 = pipeline_of(self.bundle, threads=self.threads, precision="int8")
        for name, pipeline, samples in (
            *((f"votes-{samples}", self.pipeline, samples) for samples in controls.VOTES),
            ("int8", int8, self.counting.samples),
        ):
            judge = RobustPath(
                pipeline,
                counting=Counting(samples=samples, draws=1),
                seed=self.plan.seed + RECOUNT,  # latents that no judge has drawn
                images=len(self.data),
            )
            began = time.perf_counter()
            right = torch.ones(len(self.data), dtype=torch.bool)
            clean, candidates = 0, 0
            for made in batches:
                rows = torch.from_numpy(made.rows)
                found = judge(torch.from_numpy(made.images), self.data.labels[rows], rows, made.trial)
                right[rows] &= found
                clean += int(found.sum()) if made.trial == 0 else 0
                candidates += len(rows)
            survived = right[self.rows]
            tried = Tried(
                attack="images of the adaptive attacks",
                settings={"images": candidates},
                attacked=len(self.rows),
                broken=int((~survived).sum()),
                seconds=round(time.perf_counter() - began, 2),
            )
            found = Outcome(survived=survived, clean=adaptive.clean, tried=(tried,), seconds=tried.seconds)
            settings = {**self.settings, "draws": 1, "samples": samples, "risk": self.counting.risk}
            report(self._figure("controls", name, eps, found, settings=settings, clean=clean))

    def _control(
        self, name: str, eps: float, defence: Voting, judge: Judge, settings: Settings, report: Report, *, votes: int
    ) -> None:
        trials = attacks_on_a_vote(defence, eps=eps, effort=self.plan.effort)
        campaign = self._campaign(name, eps, trials, judge, votes=votes, settings=settings)
        found = campaign.run(trials, title=f"{name} eps {eps:.2f}", quiet=self.quiet)
        report(self._figure("controls", name, eps, found, settings={**self.settings, **settings}))

    def _noised(self, noise: float, counting: Counting) -> tuple[controls.Noised, controls.NoisedVote]:
        judge = controls.NoisedVote(
            self.pipeline.sessions,
            noise=noise,
            classes=self.system.classes,
            counting=counting,
            seed=self.plan.seed,
        )
        return controls.Noised(self.system, noise=noise), judge

    def _best_noise(self, eps: float, validation: Examples) -> float:
        """Choose the noise under which most validation images withstand one attack, in elections of 100 votes."""
        rows = subset(len(validation), images=controls.VALIDATION_IMAGES, seed=self.plan.seed)
        standing = {}
        for noise in controls.NOISES:
            defence, judge = self._noised(noise, Counting(samples=100, draws=1))
            attack = attacks_on_a_vote(defence, eps=eps, effort=self.plan.effort)[:1]
            votes = self.plan.effort.latents
            campaign = self._campaign(
                f"noise-{noise}", eps, attack, judge, votes=votes, data=validation, rows=rows, split="validation"
            )
            found = campaign.run(attack, title=f"choosing noise, {noise}", quiet=self.quiet)
            standing[noise] = int(found.survived.sum())
        return max(standing, key=lambda noise: standing[noise])

    def _other(self, other: Bundle, eps: float, report: Report) -> None:
        """Measure the classifier of another bundle on the same images, by the strong protocol."""
        name = f"{other.manifest.name}-classifier"
        there = Evaluation(
            other,
            data=self.data,
            plan=self.plan,
            out=self.out / "work" / name,
            device=self.device,
            threads=self.threads,
            quiet=self.quiet,
        )

        def keep(figure: Figure) -> None:
            threat = figure.cell.threat.model_copy(update={"attack": "controls", "sees": "system"})
            cell = figure.cell.model_copy(update={"defence": name, "threat": threat})
            mine = figure.model_copy(update={"protocol": "controls", "cell": cell})
            figures.write(self.out, mine)
            report(mine)

        there.strong([eps], report=keep)

    def _campaign(
        self,
        name: str,
        eps: float,
        trials: Sequence[Trial],
        judge: Judge,
        *,
        votes: int,
        data: Examples | None = None,
        rows: Tensor | None = None,
        batch: int | None = None,
        answers: Callable[[], Mapping[str, int]] = dict,
        **more: Any,
    ) -> Campaign:
        return Campaign(
            self.out / "work" / f"{name}-{eps:.2f}",
            data=data or self.data,
            rows=self.rows if rows is None else rows,
            eps=eps,
            judge=judge,
            seed=self.plan.seed,
            batch=batch or self.batch(votes),
            answers=answers,
            belongs_to={
                "networks": figures.networks(self.bundle),
                "split": self.plan.split,
                "effort": dataclasses.asdict(self.plan.effort),
                "counting": dataclasses.asdict(self.counting),
                "trials": [[trial.name, dict(trial.settings)] for trial in trials],
                **more,
            },
            device=self.device,
        )

    def _figure(
        self,
        protocol: Protocol,
        defence: str,
        eps: float,
        found: Outcome,
        *,
        settings: Settings,
        sees: Sees = "system",
        clean: int | None = None,
    ) -> Figure:
        figure = Figure(
            protocol=protocol,
            measured=self.measured,
            cell=Cell(
                defence=defence,
                threat=Threat(attack=protocol, norm="linf", eps=eps, sees=sees, settings=settings),
                correct=int(found.survived.sum()),
                images=len(self.rows),
                published=None,
            ),
            clean=int(found.clean.sum()) if clean is None else clean,
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
