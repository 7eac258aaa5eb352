"""How many votes an image needs: python -m benchmarks.votes

For the clean test images and each attacked version of the published table (made against the bundle's classifier), all
votes of each image are cast once; then the exact rule and the risk-limited one are replayed on them. `others` counts
the images whose early answer is not that of the full count. The accuracies are transfer accuracies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer
from carso.bundle import Bundle
from carso.inference.jobs import Job, Result, Ticket, VotePlan
from carso.inference.pipeline import Pipeline
from carso.inference.sessions import Sessions
from carso.inference.vote import StoppingRule
from carso.settings import Settings
from carso_training.attacks.batches import attacked_batches
from carso_training.datasets.examples import Examples
from carso_training.datasets.mnist import MNIST
from carso_training.export.weights import classifier_of
from carso_training.robustness.published import PUBLISHED_ATTACKS
from rich.progress import Progress

from benchmarks.replay import cast_all, one_by_one, replay
from benchmarks.report import REFERENCE, BundleFolder, JsonFile, begin, console, keep, progress_console, table

RISKS = (1e-2, 1e-3, 1e-6, 0.0)
PERCENTILES = (50, 90, 99)
CHUNK = 100  # images between two steps of the progress bar


@dataclass(frozen=True)
class Elections:
    """The full counts of one attack's images."""

    attack: str
    images: np.ndarray  # [N, *shape] float32
    labels: np.ndarray  # [N], the truth
    fast: np.ndarray  # [N], the fast path's answers
    votes: np.ndarray  # [N, samples] uint8


@dataclass(frozen=True)
class Row:
    """One attack at one risk, over all images."""

    attack: str
    risk: float  # 0: exact
    images: int
    mean: float
    percentiles: tuple[int, ...]
    most: int
    one_by_one: float  # mean votes if the rule were checked after every vote
    rounds: float  # mean
    others: int  # answers that are not the full count's
    right: int
    full_right: int  # of the full count
    fast_right: int  # of the fast path


def full_counts(bundle: Bundle, sessions: Sessions, data: Examples, *, seed: int) -> Iterator[Elections]:
    """Attack by attack, the elections of all images of `data`; an image's place is its seed."""
    classifier = classifier_of(bundle)
    samples, latent = bundle.manifest.samples, bundle.manifest.latent
    with Progress(console=progress_console, transient=True) as progress:
        for place, attack in enumerate(PUBLISHED_ATTACKS):
            batches = attacked_batches(classifier, attack, data, seed=seed + place, quiet=True)
            images = torch.cat(list(batches)).numpy()
            task = progress.add_task(attack.name, total=len(images))
            fast, votes = [], []
            for start in range(0, len(images), CHUNK):
                first = sessions.first_pass(images[start : start + CHUNK])
                fast.append(first.probabilities.argmax(axis=1))
                seeds = range(start, start + len(first.codes))
                votes.append(cast_all(sessions, first.codes, seeds=seeds, samples=samples, latent=latent))
                progress.advance(task, len(seeds))
            labels = data.labels.numpy()
            yield Elections(attack.name, images, labels, np.concatenate(fast), np.concatenate(votes))


def row(elections: Elections, rule: StoppingRule) -> Row:
    counts, fewest = [], []
    for votes, expected in zip(elections.votes, elections.fast.tolist(), strict=True):
        known = votes.tolist()
        counts.append(replay(known, rule, expected=expected))
        fewest.append(replay(known, rule, one_by_one, expected=expected).votes)
    answers = np.array([count.label for count in counts])
    cast = np.array([count.votes for count in counts])
    full = _full_answers(elections.votes, rule.classes)
    return Row(
        attack=elections.attack,
        risk=rule.risk,
        images=len(counts),
        mean=float(cast.mean()),
        percentiles=tuple(np.percentile(cast, PERCENTILES, method="inverted_cdf").tolist()),
        most=int(cast.max()),
        one_by_one=float(np.mean(fewest)),
        rounds=float(np.mean([count.rounds for count in counts])),
        others=int((answers != full).sum()),
        right=int((answers == elections.labels).sum()),
        full_right=int((full == elections.labels).sum()),
        fast_right=int((elections.fast == elections.labels).sum()),
    )


def same_as_pipeline(elections: Elections, rule: StoppingRule, pipeline: Pipeline, *, images: int) -> int:
    """Count those of the first `images` elections that end in the pipeline as in the replay: answer, votes and rule.

    The pipeline runs them together, each with its own seed. A vote may fall the other way where two classes are all
    but equal, as kernels for other batch sizes sum in another order; so a rare difference is no error.
    """
    tickets = [
        Ticket(Job(image[None], VotePlan(samples=rule.samples, risk=rule.risk, seed=seed)))
        for seed, image in enumerate(elections.images[:images])
    ]
    pipeline.admit(tickets)
    results: dict[Ticket, Result | None] = {}
    while pipeline.busy:
        results.update(pipeline.first_passes().finished)
        results.update(pipeline.round().finished)
    same = 0
    for ticket, votes, expected in zip(tickets, elections.votes, elections.fast.tolist(), strict=False):
        result, count = results[ticket], replay(votes.tolist(), rule, expected=expected)
        assert result is not None
        (outcome,) = result.outcomes
        same += (outcome.label, outcome.votes, outcome.ending) == (count.label, count.votes, count.rule)
    return same


def _full_answers(votes: np.ndarray, classes: int) -> np.ndarray:
    return np.array([np.bincount(of_image, minlength=classes).argmax() for of_image in votes])


def show(rows: Sequence[Row]) -> None:
    shown = table(
        "votes per image, and answers",
        *("images", "risk", "mean", *(f"p{p}" for p in PERCENTILES), "max", "one by one", "rounds"),
        *("others", "right, %", "full count, %", "fast path, %"),
    )
    for row in rows:
        shown.add_row(
            row.attack,
            _risk(row.risk),
            f"{row.mean:.1f}",
            *(str(votes) for votes in (*row.percentiles, row.most)),
            f"{row.one_by_one:.1f}",
            f"{row.rounds:.2f}",
            str(row.others),
            *(f"{100 * right / row.images:.2f}" for right in (row.right, row.full_right, row.fast_right)),
            end_section=row.risk == RISKS[-1],
        )
    console.print(shown)
    overall = table("answers that are not the full count's, over all images", "risk", "elections", "others", "share")
    for risk in RISKS:
        images = sum(row.images for row in rows if row.risk == risk)
        others = sum(row.others for row in rows if row.risk == risk)
        overall.add_row(_risk(risk), str(images), str(others), f"{others / images:.1e}")
    console.print(overall)


def _risk(risk: float) -> str:
    return f"{risk:.0e}" if risk else "exact"


def main(
    *,
    bundle: BundleFolder = REFERENCE,
    images: Annotated[int, typer.Option(min=1, max=10_000, help="Test images, drawn at random.")] = 2000,
    check: Annotated[int, typer.Option(min=0, help="Images per attack that the pipeline counts too.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawing of images and of the attacks.")] = 0,
    json: JsonFile = None,
) -> None:
    loaded = Bundle.load(bundle)
    manifest = loaded.manifest
    known = begin("votes", loaded)
    data = MNIST.load("test")
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:images]]
    sessions = Sessions(loaded)
    pipeline = Pipeline(
        sessions,
        latent=manifest.latent,
        classes=len(manifest.classes),
        round_rows=Settings.model_fields["round_rows"].default,
    )
    rules = [StoppingRule(manifest.samples, len(manifest.classes), risk) for risk in RISKS]
    rows: list[Row] = []
    same = checked = 0
    for elections in full_counts(loaded, sessions, data, seed=seed):
        for rule in rules:
            rows.append(row(elections, rule))
            same += same_as_pipeline(elections, rule, pipeline, images=check)
            checked += min(check, len(elections.images))
    show(rows)
    console.print(f"{same} of {checked} elections ended in the pipeline as in the replay", highlight=False)
    results: dict[str, Any] = {
        "rows": [asdict(row) for row in rows],
        "replay": {"checked": checked, "same": same},
    }
    keep(json, known=known, options={"images": images, "check": check, "seed": seed}, results=results)


if __name__ == "__main__":
    typer.run(main)
