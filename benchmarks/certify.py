"""What certificates cost and save, in process and over HTTP: python -m benchmarks.certify --bundle FOLDER

In process: a first pass with bounds over one without, for single images and for batches. Over HTTP: a service that is
asked for `certify=decide` and for no proof, of clean test images and of the same ones attacked by PGD against its
classifier. Phases are short and interleaved, and each ratio is taken within one repetition. The bundle must have
bounds; those that were not trained for them prove nothing, and then `decide` only costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from carso.bundle import Bundle
from carso.choices import DEFAULT_EPS, LEAST_EPS
from carso.inference.certificate import rounded_up
from carso.inference.sessions import Sessions
from carso_training.attacks import Attack
from carso_training.attacks.batches import attacked_batches
from carso_training.attacks.pgd import PGD
from carso_training.datasets.mnist import MNIST
from carso_training.export.weights import classifier_of

from benchmarks.digits import png_of
from benchmarks.load import request
from benchmarks.phases import Phase, Target, measure, series
from benchmarks.report import REFERENCE, BundleFolder, JsonFile, begin, console, keep, progress_console, table
from benchmarks.servers import Server, carso
from benchmarks.timing import interleaved, ratios, spread

BATCHES = (1, 32)  # images of one pass
CONNECTIONS = 32  # at which capacity is taken
STRENGTHS = (0.15, 0.30)  # of the attack


def in_process(bundle: Bundle, *, eps: float, repetitions: int) -> dict[str, np.ndarray]:
    """The time of a first pass with bounds over one without, repetition by repetition. Exits if there are no bounds."""
    sessions = Sessions(bundle, device="cpu")
    if sessions.unproven:
        raise SystemExit(f"nothing can be proven here: {sessions.unproven}")
    found = {}
    for size in BATCHES:
        images = np.resize(bundle.self_test.images, (size, *bundle.manifest.input.shape))
        asked = np.full(size, rounded_up(eps))
        seconds = interleaved(
            {
                "first pass": lambda images=images: sessions.first_pass(images),
                "with bounds": lambda images=images, asked=asked: sessions.first_pass_with_bounds(images, asked),
            },
            repetitions=repetitions,
        )
        name = f"with bounds / first pass, {size} image{'s' if size > 1 else ''}"
        found[name] = ratios(seconds, "with bounds", "first pass")
    return found


def bodies(bundle: Bundle, *, images: int) -> dict[str, list[bytes]]:
    """PNG files of test images drawn at random: clean ones, and each attacked version of them."""
    data = MNIST.load("test")
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:images]]
    found = {"clean": data.pixels()}
    for strength in STRENGTHS:
        batches = attacked_batches(classifier_of(bundle), Attack(PGD, strength), data, seed=0, quiet=True)
        found[f"attacked {strength:.2f}"] = torch.cat([*batches])
    return {
        kind: [png_of((image[0] * 255).round().byte().numpy()) for image in version] for kind, version in found.items()
    }


@contextmanager
def targets(bundle: Path, sent: Mapping[str, list[bytes]], *, eps: float) -> Iterator[list[Target]]:
    """For each kind of images: the fast path without a proof, the vote without one, and the vote after `decide`."""
    ways = {
        "fast": "/classify/fast?certify=off",
        "vote": "/classify?certify=off",
        "decide": f"/classify?certify=decide&certify_eps={eps}",
    }
    with carso(bundle) as service:
        yield [
            Target(f"{way}, {kind}", service, [request(path, body, content_type="image/png") for body in files])
            for kind, files in sent.items()
            for way, path in ways.items()
        ]


def certified_share(server: Server, before: Mapping[str, float]) -> float:
    """The share of images that were proven on the robust path since `before`; NaN: there were none."""
    now = server.metrics()
    proven, not_proven = (
        now.get(name, 0.0) - before.get(name, 0.0)
        for name in (
            f'carso_certified_images_total{{certified="{is_so}",path="robust"}}' for is_so in ("true", "false")
        )
    )
    return proven / (proven + not_proven) if proven + not_proven else float("nan")


def main(
    *,
    bundle: BundleFolder = REFERENCE,
    eps: Annotated[float, typer.Option(min=LEAST_EPS, max=1.0, help="Of the proofs.")] = DEFAULT_EPS,
    repetitions: Annotated[int, typer.Option(min=1)] = 7,
    seconds: Annotated[float, typer.Option(min=0.2, help="Of one phase, after half a second's warm-up.")] = 2.5,
    images: Annotated[int, typer.Option(min=1, max=10_000, help="Different images sent, of each kind.")] = 500,
    json: JsonFile = None,
) -> None:
    loaded = Bundle.load(bundle)
    known = begin("certify", loaded)
    cost = in_process(loaded, eps=eps, repetitions=repetitions)
    sent = bodies(loaded, images=images)
    phases: list[Phase] = []
    shares: dict[str, list[float]] = {kind: [] for kind in sent}
    with targets(bundle, sent, eps=eps) as all_of_them, progress_console.status("") as status:
        for repetition in range(repetitions):
            status.update(f"repetition {repetition + 1} of {repetitions}")
            turn = repetition % len(all_of_them)
            for target in all_of_them[turn:] + all_of_them[:turn]:
                before = target.server.metrics()
                load = target.load(connections=CONNECTIONS)
                phases.append(measure(target, load, kind="closed", repetition=repetition, seconds=seconds))
                way, kind = target.name.split(", ")
                if way == "decide":
                    shares[kind].append(certified_share(target.server, before))

    def throughput(way: str, kind: str) -> np.ndarray:
        return series(phases, "throughput", target=f"{way}, {kind}")

    shown = table("time in process: median over repetitions, with quartiles", "what", "ratio")
    for what, ratio in cost.items():
        shown.add_row(what, spread(ratio))
    console.print(shown)
    shown = table(
        f"throughput with {CONNECTIONS} connections, proofs at eps {eps:g}: medians over repetitions, with quartiles",
        *("images", "proven, %", "decide / fast", "vote / fast", "decide / vote", "decide / decide on clean ones"),
    )
    found = {}
    for kind in sent:
        decided = throughput("decide", kind)
        found[kind] = {
            "decide / fast": decided / throughput("fast", kind),
            "vote / fast": throughput("vote", kind) / throughput("fast", kind),
            "decide / vote": decided / throughput("vote", kind),
            "decide / decide on clean ones": decided / throughput("decide", "clean"),
        }
        share = f"{100 * float(np.median(shares[kind])):.1f}"
        shown.add_row(kind, share, *(spread(ratio, digits=3) for ratio in found[kind].values()))
    console.print(shown)
    failures = sum(phase.failures for phase in phases)
    console.print(f"{failures} requests failed" if failures else "no request failed")
    keep(
        json,
        known=known,
        options={"eps": eps, "repetitions": repetitions, "seconds": seconds, "images": images},
        results={
            "in_process": {what: ratio.tolist() for what, ratio in cost.items()},
            "proven": shares,
            "ratios": {kind: {what: ratio.tolist() for what, ratio in each.items()} for kind, each in found.items()},
            "phases": [asdict(phase) for phase in phases],
        },
    )


if __name__ == "__main__":
    typer.run(main)
