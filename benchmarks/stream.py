"""What a stream's `rate` buys: python -m benchmarks.stream

The first test images, and their versions of PGD at eps 0.30 that were made against the bundle's classifier (a transfer
attack), are answered once by both paths. Streams are then drawn from them, and thinned by the policy that serves, at
each rate and with fixed seeds. An attack begins after a thousand clean frames. No figure depends on how fast the
machine is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import inf
from statistics import mean, median
from typing import Annotated

import numpy as np
import torch
import typer
from carso.bundle import Bundle
from carso.inference.jobs import Job, Result, VotePlan
from carso.inference.pipeline import Pipeline
from carso.inference.sessions import Sessions
from carso.inference.thinning import Policy, Thinning
from carso.settings import Settings
from carso.telemetry.evidence import ALARM, Evidence, upper_bound
from carso_training.attacks.batches import attacked_batches
from carso_training.datasets.mnist import MNIST
from carso_training.export.weights import classifier_of
from carso_training.robustness.published import PUBLISHED_ATTACKS

from benchmarks.report import REFERENCE, BundleFolder, JsonFile, begin, console, keep, table

ATTACK = "pgd-0.30"
RATES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SHARES = (0.0, 0.05, 1.0)  # of attacked frames
BEFORE = 1000  # clean frames before an attack begins
FRAMES = 3000  # frames after that
RUNS = 11
CHUNK = 50  # images that are counted together


@dataclass(frozen=True)
class Answers:
    """What both paths say of some images."""

    labels: list[int]  # the truth
    fast: list[int]
    robust: list[int]
    votes: list[int]

    def accuracies(self) -> dict[str, float]:
        """Return each path's share of right answers."""
        paths = {"fast": self.fast, "robust": self.robust}
        return {path: float(np.mean(np.equal(answers, self.labels))) for path, answers in paths.items()}


@dataclass(frozen=True)
class Row:
    """One stream at one rate, over all runs, from the attack's beginning. Delays are medians; inf: none in FRAMES."""

    share: float  # of attacked frames
    rate: float
    right: float  # share of frames whose last answer is right
    votes: float  # per frame
    until_disagreement: float  # frames until the paths disagree on one that is counted
    until_alarm: float  # frames until the evidence of an attack


def answered(pipeline: Pipeline, images: np.ndarray, labels: np.ndarray, *, plan: VotePlan) -> Answers:
    """Answer by both paths; an image's place is its seed."""
    results: list[Result] = []
    for start in range(0, len(images), CHUNK):
        part = range(start, min(start + CHUNK, len(images)))
        results += pipeline.run([Job(images[[place]], replace(plan, seed=place)) for place in part])
    return Answers(
        labels.tolist(),
        fast=[int(result.probabilities[0].argmax()) for result in results],
        robust=[result.outcomes[0].label for result in results],
        votes=[result.outcomes[0].votes for result in results],
    )


def frames(clean: Answers, attacked: Answers, *, share: float, chance: random.Random) -> Iterator[tuple[Answers, int]]:
    """Draw the frames of a stream: BEFORE clean ones, and FRAMES with a `share` of attacked ones."""
    for number in range(BEFORE + FRAMES):
        source = attacked if number >= BEFORE and chance.random() < share else clean
        yield source, chance.randrange(len(source.labels))


def run(clean: Answers, attacked: Answers, *, rate: float, share: float, bound: float, seed: int) -> Row:
    """Thin one stream."""
    chance = random.Random(seed)
    thinning = Thinning(Policy(rate=rate, max_rate=rate), draw=random.Random(-1 - seed).random)
    evidence = Evidence(bound)
    right = votes = 0
    until_disagreement = until_alarm = inf
    for number, (source, index) in enumerate(frames(clean, attacked, share=share, chance=chance), 1 - BEFORE):
        answer = source.fast[index]
        counted = thinning.choose(margin=1.0, typical=None, load=0.0).counted
        if counted:
            disagrees = source.robust[index] != answer
            answer = source.robust[index]
            evidence.add(disagrees)
        if number < 1:
            continue
        right += answer == source.labels[index]
        if counted:
            votes += source.votes[index]
            if disagrees:
                until_disagreement = min(until_disagreement, number)
            if evidence.value >= ALARM:
                until_alarm = min(until_alarm, number)
    return Row(share, rate, right / FRAMES, votes / FRAMES, until_disagreement, until_alarm)


def measure(clean: Answers, attacked: Answers, *, bound: float) -> list[Row]:
    """Run every stream at every rate."""
    rows = []
    for share in SHARES:
        for rate in RATES:
            runs = [run(clean, attacked, rate=rate, share=share, bound=bound, seed=seed) for seed in range(RUNS)]
            rows.append(
                Row(
                    share,
                    rate,
                    right=mean(row.right for row in runs),
                    votes=mean(row.votes for row in runs),
                    until_disagreement=median(row.until_disagreement for row in runs),
                    until_alarm=median(row.until_alarm for row in runs),
                )
            )
    return rows


def in_words(found: float) -> str:
    """Say after how many frames something happened."""
    return f"none in {FRAMES}" if found == inf else f"{found:.0f}"


def main(
    bundle_folder: BundleFolder = REFERENCE,
    images: Annotated[int, typer.Option(min=1, help="Test images.")] = 1000,
    json_file: JsonFile = None,
) -> None:
    """Measure accuracy, cost, and the delay until an attack is noticed, as the rate goes from 0 to 1."""
    bundle = Bundle.load(bundle_folder)
    manifest, measured = bundle.manifest, bundle.manifest.disagreement
    if measured is None:
        raise typer.BadParameter("this bundle does not say how often its paths disagree: use carso-train disagreement")
    known = begin("stream", bundle)
    data = MNIST.load("test")[torch.arange(images)]
    attacks = {attack.name: attack for attack in PUBLISHED_ATTACKS}
    pipeline = Pipeline(
        Sessions(bundle, device="cpu", precision="float32"),
        latent=manifest.latent,
        classes=len(manifest.classes),
        round_rows=Settings.model_fields["round_rows"].default,
    )
    plan = VotePlan(samples=manifest.samples, risk=Settings.model_fields["risk"].default)
    clean, attacked = (
        answered(
            pipeline,
            torch.cat(list(attacked_batches(classifier_of(bundle), attacks[name], data, seed=0, quiet=True))).numpy(),
            data.labels.numpy(),
            plan=plan,
        )
        for name in ("clean", ATTACK)
    )
    rows = measure(clean, attacked, bound=upper_bound(measured.disagree, measured.images))
    accuracies = {name: answers.accuracies() for name, answers in (("clean", clean), (ATTACK, attacked))}
    for name, of_path in accuracies.items():
        console.print(f"{name}: {', '.join(f'{path} {accuracy:.1%}' for path, accuracy in of_path.items())}")
    shown = table("streams", "attacked", "rate", "right", "votes per frame", "until disagreement", "until alarm")
    for row in rows:
        shown.add_row(
            f"{row.share:.0%}",
            f"{row.rate:g}",
            f"{row.right:.1%}",
            f"{row.votes:.2f}",
            in_words(row.until_disagreement),
            in_words(row.until_alarm),
        )
    console.print(shown)
    finite = [{name: None if value == inf else value for name, value in asdict(row).items()} for row in rows]
    kept = {"accuracies": accuracies, "rows": finite}
    keep(json_file, known=known, options={"images": images, "attack": ATTACK, "runs": RUNS}, results=kept)


if __name__ == "__main__":
    typer.run(main)
