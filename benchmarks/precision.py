"""What int8 votes change, and what they save: python -m benchmarks.precision

On the clean test images and each attacked version of the published table (made against the bundle's classifier), both
graphs cast the same votes: same codes, same latents. `others` counts the images whose full count elects another class.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import torch
import typer
from carso.bundle import Bundle
from carso.inference.sessions import Sessions
from carso_training.attacks.batches import attacked_batches
from carso_training.datasets.mnist import MNIST
from carso_training.export.weights import classifier_of
from carso_training.robustness.published import PUBLISHED_ATTACKS
from rich.progress import track

from benchmarks.report import REFERENCE, BundleFolder, JsonFile, begin, console, keep, progress_console, table
from benchmarks.timing import interleaved, ratios, spread

ROWS = (12, 64, 256, 1500)
CHUNK = 20  # images whose votes are cast in one run


@dataclass(frozen=True)
class Compared:
    attack: str
    images: int
    votes: int  # per image
    differing: int  # votes
    others: int  # full counts
    right_float32: int
    right_int8: int


def compare(
    attack: str, plain: Sessions, int8: Sessions, images: np.ndarray, labels: np.ndarray, *, votes: int, latent: int
) -> Compared:
    classes = plain.first_pass(images[:1]).probabilities.shape[1]
    rng = np.random.default_rng(0)
    differing = others = right_plain = right_int8 = 0
    for start in track(range(0, len(images), CHUNK), description=attack, console=progress_console, transient=True):
        codes = plain.first_pass(images[start : start + CHUNK]).codes
        rows = np.repeat(np.arange(len(codes)), votes)
        latents = rng.standard_normal((len(rows), latent), np.float32)
        cast = [sessions.vote(codes, rows, latents) for sessions in (plain, int8)]
        elected = [
            np.bincount(rows * classes + votes_cast, minlength=len(codes) * classes).reshape(-1, classes).argmax(axis=1)
            for votes_cast in cast
        ]
        truth = labels[start : start + CHUNK]
        differing += int((cast[0] != cast[1]).sum())
        others += int((elected[0] != elected[1]).sum())
        right_plain += int((elected[0] == truth).sum())
        right_int8 += int((elected[1] == truth).sum())
    return Compared(attack, len(images), votes, differing, others, right_plain, right_int8)


def main(
    *,
    bundle: BundleFolder = REFERENCE,
    images: Annotated[int, typer.Option(min=1, help="Test images, drawn at random.")] = 500,
    votes: Annotated[int, typer.Option(min=1, help="Per image.")] = 300,
    repetitions: Annotated[int, typer.Option(min=1, help="Of the timing.")] = 15,
    json: JsonFile = None,
) -> None:
    loaded = Bundle.load(bundle)
    known = begin("precision", loaded)
    plain, int8 = (Sessions(loaded, device="cpu", precision=precision) for precision in ("float32", "int8"))
    test = loaded.self_test
    speed = {}
    for rows in ROWS:
        latents = np.random.default_rng(0).standard_normal((rows, loaded.manifest.latent), np.float32)
        feeds = test.codes[:1], np.zeros(rows, np.int64), latents
        seconds = interleaved(
            {"float32": lambda feeds=feeds: plain.vote(*feeds), "int8": lambda feeds=feeds: int8.vote(*feeds)},
            repetitions=repetitions,
        )
        speed[rows] = ratios(seconds, "float32", "int8")
    shown = table("float32 / int8, time of one run, median [quartiles]", *(f"{rows} votes" for rows in ROWS))
    shown.add_row(*(spread(speed[rows]) for rows in ROWS))
    console.print(shown)

    data = MNIST.load("test")
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:images]]
    classifier = classifier_of(loaded)
    found = []
    for place, attack in enumerate(PUBLISHED_ATTACKS):
        attacked = torch.cat([*attacked_batches(classifier, attack, data, seed=place, quiet=True)]).numpy()
        found.append(
            compare(attack.name, plain, int8, attacked, data.labels.numpy(), votes=votes, latent=loaded.manifest.latent)
        )
    shown = table(
        f"the same {votes} votes of {images} images, cast by both",
        *("images", "votes differing, %", "other answers", "right, float32", "right, int8"),
    )
    for row in found:
        share = 100 * row.differing / (row.images * row.votes)
        shown.add_row(row.attack, f"{share:.3f}", str(row.others), str(row.right_float32), str(row.right_int8))
    console.print(shown)
    keep(
        json,
        known=known,
        options={"images": images, "votes": votes, "repetitions": repetitions},
        results={
            "speed": {str(rows): values.tolist() for rows, values in speed.items()},
            "compared": [asdict(row) for row in found],
        },
    )


if __name__ == "__main__":
    typer.run(main)
