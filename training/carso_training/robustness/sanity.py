"""Checks that an evaluation is not fooling itself (Carlini et al., 2019, arXiv:1902.06705; Athalye et al., 2018).

An attack that fails looks exactly like a defence that holds. Each check here is a statement that is true of an attack
that works, made on a small random part of the images. `Planted` breaks the gradients of the defence on purpose: the
same checks must then fail, or they could not fail at all.
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from carso_training.attacks.apgd import Loss, cross_entropy, negative_log
from carso_training.attacks.attack import Scores
from carso_training.attacks.fgsm import fgsm
from carso_training.networks.system import AVERAGES, Average, System
from carso_training.robustness import figures, trials
from carso_training.robustness.adaptive import GOAL
from carso_training.robustness.campaign import Campaign, Trial
from carso_training.robustness.evaluation import Evaluation, subset
from carso_training.robustness.figures import Checked, Sanity
from carso_training.robustness.judges import Judge

STRENGTHS = (0.05, 0.15, 0.30, 0.50, 1.00)  # 1.00 is unbounded: any image may become any other
TARGETS = 3
VOTES_OF_COPY = 25
COARSE = 8  # levels of the planted rounding
WAVES, HEIGHT = 1e4, 0.05  # of the planted ripple: its gradient is up to 500 times the true one, with a sign of its own
DIFFERENCE = 1e-5  # of finite differences, in float64
AGREEMENT = 1e-4  # of them with the gradient, relative to its length


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One attack of the checks: which images withstood it, [n] bool, of those that were correct before."""

    survived: Tensor
    clean: Tensor

    @property
    def accuracy(self) -> float:
        """In percent of all images."""
        return 100 * float(self.survived.float().mean())


class Checks:
    """The checks of one evaluated system at one eps."""

    def __init__(self, evaluation: Evaluation, *, images: int, eps: float) -> None:
        """`images`: how many of the test images, drawn at random."""
        self.evaluation, self.eps, self.effort = evaluation, eps, evaluation.plan.effort
        self.system, self.votes = evaluation.system, self.effort.latents
        self.rows = subset(len(evaluation.data), images=images, seed=evaluation.plan.seed)
        self.slack = max(1, len(self.rows) // 100)  # images: one, or one percent

    def run(self) -> Sanity:
        """Make every check. Resumes from what the evaluation's folder holds. Raises RunError and OSError."""
        began = time.perf_counter()
        checks = (
            self.iterative_beats_single_step(),
            *self.accuracy_falls(),
            *self.more_changes_little(),
            *self.white_box_beats_others(),
            self.gradients_are_right(),
            self.gradients_are_there(),
            *self.chance_is_no_shelter(),
            *self.planted_defences_are_caught(),
        )
        sanity = Sanity(
            measured=self.evaluation.measured,
            eps=self.eps,
            images=len(self.rows),
            settings={
                "effort": self.effort.name,
                "steps": self.effort.steps,
                "latents": self.votes,
                "targets": TARGETS,
                "queries": self.effort.queries,
                "draws": self.effort.draws,
            },
            checks=checks,
            seed=self.evaluation.plan.seed,
            seconds=round(time.perf_counter() - began, 1),
        )
        figures.write(self.evaluation.out, sanity)
        return sanity

    def iterative_beats_single_step(self) -> Checked:
        """An attack of many steps breaks whatever one step breaks."""

        def one_step(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            scores = self.system.fresh("logits", votes=self.votes, generator=generator)
            return fgsm(scores, images, labels, eps=self.eps)

        single = self.arm("single-step", [Trial(name="fgsm", make=one_step)])
        core = self.core()
        only = int((core.survived & ~single.survived).sum())
        return Checked(
            name="What a single step breaks, the iterative attack breaks too",
            passed=only <= self.slack,
            evidence=f"{only} images are broken by the single step alone; {_percent(core)} withstand the iterative "
            f"attack, {_percent(single)} the single step",
            rule=f"at most {self.slack} images",
        )

    def accuracy_falls(self) -> tuple[Checked, Checked, Checked]:
        """Accuracy falls with eps: to chance at 0.5, and to nothing without a bound."""
        arms = [self.core(eps) for eps in STRENGTHS]
        counts = [int(arm.survived.sum()) for arm in arms]
        shown = ", ".join(f"{eps:.2f}: {_percent(arm)}" for eps, arm in zip(STRENGTHS, arms, strict=True))
        chance = 100 / self.system.classes
        return (
            Checked(
                name="Accuracy falls as eps grows",
                passed=all(after <= before + self.slack for before, after in pairwise(counts)),
                evidence=shown,
                rule=f"no rise by more than {self.slack} images",
            ),
            Checked(
                name="Accuracy is at most chance at eps 0.50",
                passed=arms[-2].accuracy <= chance,
                evidence=_percent(arms[-2]),
                rule=f"at most {chance:.0f} %",
            ),
            Checked(
                name="Nothing withstands an unbounded attack",
                passed=counts[-1] == 0,
                evidence=_percent(arms[-1]),
                rule="0 %",
            ),
        )

    def more_changes_little(self) -> tuple[Checked, ...]:
        """Twice the steps, twice the restarts or twice the latents break hardly more."""
        core = self.core()
        harder = {
            "steps": self.core(steps=2 * self.effort.steps, name="twice-the-steps"),
            "restarts": self.core(name="another-restart"),
            "latents": self.core(votes=2 * self.votes, name="twice-the-latents"),
        }
        checks = []
        for what, arm in harder.items():
            both = int((core.survived & arm.survived).sum()) if what == "restarts" else int(arm.survived.sum())
            gained = int(core.survived.sum()) - both
            checks.append(
                Checked(
                    name=f"Twice the {what} break hardly more",
                    passed=gained <= self.slack,
                    evidence=f"{gained} images more, of {int(core.survived.sum())} that withstand the attack",
                    rule=f"at most {self.slack} images more",
                )
            )
        return tuple(checks)

    def white_box_beats_others(self) -> tuple[Checked, Checked]:
        """Who knows everything breaks more than who knows the classifier, or only answers."""
        return (
            self.against("transfer from the first pass", self.core(), self.transfer()),
            self.against("attacks without gradients (Square)", self.core(), self.black_box()),
        )

    def gradients_are_right(self) -> Checked:
        """Gradients agree with finite differences, in float64."""
        double = self.system.double_copy()
        worst = 0.0
        for average in AVERAGES:
            images, labels, generator = self._few(torch.float64)
            latents = torch.randn(self.votes, self.system.latent, generator=generator, device=images.device).double()
            scores = double.scores(average, votes=self.votes, latents=_repeated(latents))
            loss = negative_log if average == "log-probabilities" else cross_entropy

            def value(x: Tensor, scores: Scores = scores, loss: Loss = loss, labels: Tensor = labels) -> Tensor:
                return loss(scores(x), labels)

            gradient = _gradient(value, images)
            way = torch.randn(images.shape, generator=generator, device=images.device).double()
            way /= way.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            with torch.no_grad():
                slope = (value(images + DIFFERENCE * way) - value(images - DIFFERENCE * way)) / (2 * DIFFERENCE)
            expected = (gradient * way).flatten(1).sum(dim=1)
            off = (slope - expected).abs() / gradient.flatten(1).norm(dim=1).clamp_min(1e-300)
            worst = max(worst, float(off.median()))
        return Checked(
            name="Gradients agree with finite differences in float64",
            passed=worst <= AGREEMENT,
            evidence=f"off by {worst:.1e} of the gradient's length (median over images, worst stand-in for the vote)",
            rule=f"at most {AGREEMENT:.0e}",
        )

    def gradients_are_there(self, system: System | None = None) -> Checked:
        """Count images whose gradient is zero, in the float32 that attacks compute in."""
        zero: dict[Average, int] = {}
        for average in AVERAGES:
            images, labels, generator = self._few(torch.float32)
            scores = (system or self.system).fresh(average, votes=self.votes, generator=generator)
            gradient = _gradient(lambda x, s=scores, y=labels: cross_entropy(s(x), y), images)
            zero[average] = int((gradient.flatten(1).abs().amax(dim=1) == 0).sum())
        return Checked(
            name="Gradients are not zero",
            passed=min(zero.values()) <= self.slack,
            evidence=", ".join(f"{average}: {count} of {len(self.rows)} images" for average, count in zero.items())
            + "; these are attacked by transfer and by Square too",
            rule=f"at most {self.slack} images for the best stand-in for the vote",
        )

    def chance_is_no_shelter(self) -> tuple[Checked, ...]:
        """A vote whose latents the attacker knows is no harder to break than one over fresh ones."""
        core, checks = self.core(), []
        generator = torch.Generator(self.evaluation.device).manual_seed(self.evaluation.plan.seed)
        device, latent = self.evaluation.device, self.system.latent
        known = {
            "fixed latents": torch.randn(self.votes, latent, generator=generator, device=device),
            "one zero latent": torch.zeros(1, latent, device=device),
        }
        for what, latents in known.items():
            scores = self.system.scores("logits", votes=len(latents), latents=_repeated(latents))
            arm = self.arm(
                what.replace(" ", "-"),
                self.attacks(lambda generator, scores=scores: scores, steps=self.effort.steps, eps=self.eps),
                judge=Copy(self.system, _repeated(latents), votes=len(latents)),
            )
            more = int(arm.survived.sum()) - int(core.survived.sum())
            checks.append(
                Checked(
                    name=f"A vote over {what} that the attacker knows is no safer",
                    passed=more <= 2 * self.slack,
                    evidence=f"{_percent(arm)} against {_percent(core)} over fresh latents",
                    rule=f"at most {2 * self.slack} images more",
                )
            )
        return tuple(checks)

    def planted_defences_are_caught(self) -> tuple[Checked, Checked]:
        """Two defences that only hide gradients fail the checks above."""
        rounded = Planted(self.system, _rounded)
        gone = self.gradients_are_there(rounded)
        rippled = Planted(self.system, _rippled)
        generator = torch.Generator(self.evaluation.device).manual_seed(self.evaluation.plan.seed)
        judge = Copy(
            rippled,
            lambda rows: torch.randn(rows, rippled.latent, generator=generator, device=generator.device),
            votes=VOTES_OF_COPY,
        )
        own, true = (
            self.arm(name, self.attacks(self._fresh(seen), steps=self.effort.steps, eps=self.eps), judge=judge)
            for name, seen in (("rippled", rippled), ("rippled-transfer", self.system))
        )
        beaten = self.against("transfer from the true system", own, true)
        return (
            Checked(
                name="A planted defence without gradients (pixels rounded to eight levels) is caught",
                passed=not gone.passed,
                evidence=f"the check “{gone.name}” fails on it: {gone.evidence}",
                rule="that check fails",
            ),
            Checked(
                name="A planted defence with shattered gradients (a fine ripple on the pixels) is caught",
                passed=not beaten.passed,
                evidence=f"it seems to keep {_percent(own)}; images made against the true system leave "
                f"{_percent(true)}",
                rule="white-box attacks on it break fewer images than transferred ones",
            ),
        )

    def against(self, what: str, white_box: Arm, other: Arm) -> Checked:
        """Compare an attack through everything with another one on the same defence."""
        return Checked(
            name=f"White-box attacks are at least as strong as {what}",
            passed=int(white_box.survived.sum()) <= int(other.survived.sum()) + self.slack,
            evidence=f"{_percent(white_box)} against {_percent(other)}; "
            f"{int((white_box.survived & ~other.survived).sum())} images are broken by the other alone",
            rule=f"at most {self.slack} images more withstand it",
        )

    def core(self, eps: float | None = None, *, steps: int = 0, votes: int = 0, name: str = "core") -> Arm:
        """The attack that the checks are about: APGD-CE and targeted APGD on the mean raw scores."""
        eps = self.eps if eps is None else eps
        view = self._fresh(self.system, votes or self.votes)
        return self.arm(f"{name}-{eps:.2f}", self.attacks(view, steps=steps or self.effort.steps, eps=eps), eps=eps)

    def transfer(self) -> Arm:
        """The same attack, on the first pass alone."""
        return self.arm(
            "transfer",
            self.attacks(lambda generator: self.system.classifier_scores(), steps=self.effort.steps, eps=self.eps),
        )

    def black_box(self) -> Arm:
        """Square, on the votes' mean probabilities over latents that stay."""
        held = self.effort.latents_of_square

        def answers(generator: torch.Generator) -> Scores:
            return self.system.held("softmax", votes=held, generator=generator)

        return self.arm(
            "square", [trials.squares("square", answers, eps=self.eps, queries=self.effort.queries, goal=GOAL)]
        )

    def attacks(self, view: trials.View, *, steps: int, eps: float) -> list[Trial]:
        """APGD-CE and targeted APGD on what `view` gives."""
        ranks = range(min(TARGETS, self.system.classes - 1))
        return [
            trials.untargeted("apgd-ce", view, eps=eps, steps=steps),
            *(trials.targeted(f"apgd-t-{rank + 1}", view, rank=rank, eps=eps, steps=steps) for rank in ranks),
        ]

    def arm(self, name: str, attacks: Sequence[Trial], *, eps: float | None = None, judge: Judge | None = None) -> Arm:
        """Run attacks on the images of the checks; nothing is run twice."""
        evaluation, eps = self.evaluation, self.eps if eps is None else eps
        campaign = Campaign(
            evaluation.out / "work" / "sanity" / name,
            data=evaluation.data,
            rows=self.rows,
            eps=eps,
            judge=judge or evaluation.robust_path(),
            seed=evaluation.plan.seed + zlib.crc32(name.encode()),  # every arm has starts of its own
            batch=evaluation.batch(2 * self.votes),
            belongs_to={
                "networks": figures.networks(evaluation.bundle),
                "split": evaluation.plan.split,
                "effort": dataclasses.asdict(self.effort),
                "trials": [[trial.name, dict(trial.settings)] for trial in attacks],
            },
            device=evaluation.device,
        )
        found = campaign.run(attacks, quiet=evaluation.quiet, title=f"sanity {name}")
        return Arm(survived=found.survived, clean=found.clean)

    def _fresh(self, system: System, votes: int = 0) -> trials.View:
        return lambda generator: system.fresh("logits", votes=votes or self.votes, generator=generator)

    def _few(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, torch.Generator]:
        device, data = self.evaluation.device, self.evaluation.data
        generator = torch.Generator(device).manual_seed(self.evaluation.plan.seed)
        return data.pixels(self.rows).to(device, dtype), data.labels[self.rows].to(device), generator


class Copy:
    """A judge that counts votes of the attacked copy: for defences that no bundle holds."""

    def __init__(self, system: System, latents: Callable[[int], Tensor], *, votes: int) -> None:
        self._system, self._latents, self._votes = system, latents, votes

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor, rows: Tensor, trial: int) -> Tensor:
        """Judge images; see `judges.Judge`."""
        _, scores = self._system(images, self._latents(self._votes * len(images)))
        tally = nn.functional.one_hot(scores.argmax(dim=2), self._system.classes).sum(dim=0)
        return (tally.argmax(dim=1) == labels).cpu()


class Planted(System):
    """A system whose images are changed on their way in; it shares the weights of the true one."""

    def __init__(self, system: System, change: Callable[[Tensor], Tensor]) -> None:
        nn.Module.__init__(self)
        self.latent, self.classes, self._change = system.latent, system.classes, change
        self.first_pass, self.code_encoder = system.first_pass, system.code_encoder
        self.decoder, self.second_pass = system.decoder, system.second_pass

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode the changed images; see `System.encode`."""
        return super().encode(self._change(images))


def _rounded(images: Tensor) -> Tensor:
    return (images * COARSE).round() / COARSE


def _rippled(images: Tensor) -> Tensor:
    return images + HEIGHT * torch.sin(WAVES * images)


def _repeated(latents: Tensor) -> Callable[[int], Tensor]:
    """The same latents [K, latent] for every image of a batch."""
    return lambda rows: latents.repeat_interleave(rows // len(latents), dim=0)


def _gradient(value: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    images = images.detach().requires_grad_(True)
    return torch.autograd.grad(value(images).sum(), images)[0]


def _percent(arm: Arm) -> str:
    return f"{arm.accuracy:.1f} %"
