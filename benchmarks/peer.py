"""The service beside the same system in a popular serving framework, LitServe: python -m benchmarks.peer

The same graphs, runtime, images and client in one run. LitServe counts every vote, once as one worker that has all
processors and once as a worker per processor. The service counts until the outcome is certain (risk 0, the same
answer as all votes) and at its default risk.
"""

from __future__ import annotations

import base64
import json as jsonlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from carso.bundle import Bundle
from carso.inference.sessions import usable_cpus

from benchmarks.digits import png_digits
from benchmarks.load import request
from benchmarks.phases import Phase, Target, measure, median, series
from benchmarks.report import REFERENCE, BundleFolder, JsonFile, begin, console, keep, progress_console, table
from benchmarks.servers import Server, carso, running
from benchmarks.timing import spread

CONCURRENCIES = (1, 8, 32)
EXACT, DEFAULT = "carso, exact", "carso, default risk"
ONE_WORKER, WORKERS = "litserve, 1 worker", "litserve, a worker per cpu"


@contextmanager
def targets(bundle: Path, *, images: int) -> Iterator[list[Target]]:
    bodies = png_digits(images)
    cpus = usable_cpus()
    samples = Bundle.load(bundle).manifest.samples
    in_json = [jsonlib.dumps({"image": base64.b64encode(body).decode()}).encode() for body in bodies]
    to_peer = [request("/predict", body, content_type="application/json") for body in in_json]

    def to_service(options: str) -> list[bytes]:
        return [request(f"/classify?{options}", body, content_type="image/png") for body in bodies]

    def peer(*, workers: int, threads: int) -> AbstractContextManager[Server]:
        options = ("--port={port}", f"--workers={workers}", f"--threads={threads}")
        return running("benchmarks.litserve_peer", str(bundle), *options, ready="/health")

    with ExitStack() as stack:
        service = stack.enter_context(carso(bundle))
        made = [
            Target(EXACT, service, to_service(f"samples={samples}&risk=0")),
            Target(DEFAULT, service, to_service(f"samples={samples}")),
            Target(ONE_WORKER, stack.enter_context(peer(workers=1, threads=cpus)), to_peer),
        ]
        if cpus > 1:
            made.append(Target(WORKERS, stack.enter_context(peer(workers=cpus, threads=1)), to_peer))
        yield made


def show(phases: list[Phase]) -> None:
    names = list(dict.fromkeys(phase.target for phase in phases))
    shown = table(
        "closed loop; medians, of ratios with quartiles",
        *("server", "connections", "answers/s", "p50, ms", "p99, ms", "failed"),
        *(f"throughput / {name.removeprefix('litserve, ')}" for name in names if name.startswith("litserve")),
    )
    for connections in dict.fromkeys(phase.setting for phase in phases):
        for name in names:
            chosen = {"target": name, "setting": connections}
            own = series(phases, "throughput", **chosen)
            against = [
                spread(own / series(phases, "throughput", target=peer, setting=connections))
                for peer in names
                if peer.startswith("litserve")
            ]
            shown.add_row(
                name,
                f"{connections:.0f}",
                f"{median(phases, 'throughput', **chosen):.1f}",
                f"{median(phases, 'p50', **chosen):.2f}",
                f"{median(phases, 'p99', **chosen):.2f}",
                str(int(series(phases, "failures", **chosen).sum())),
                *against,
                end_section=name == names[-1],
            )
    console.print(shown)


def main(
    *,
    bundle: BundleFolder = REFERENCE,
    repetitions: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[
        float, typer.Option(min=0.2, help="Of one phase, after half of that as warm-up; several times a p99, at least.")
    ] = 8.0,
    images: Annotated[int, typer.Option(min=1, max=10_000, help="Different images sent.")] = 1000,
    json: JsonFile = None,
) -> None:
    known = begin("peer", Bundle.load(bundle))
    phases: list[Phase] = []
    with targets(bundle, images=images) as every, progress_console.status("") as status:
        for repetition in range(repetitions):
            status.update(f"repetition {repetition + 1} of {repetitions}")
            turn = repetition % len(every)
            phases += [
                measure(
                    target,
                    target.load(connections=connections),
                    kind="closed",
                    repetition=repetition,
                    seconds=seconds,
                    warm_up=seconds / 2,
                )
                for connections in CONCURRENCIES
                for target in every[turn:] + every[:turn]
            ]
    show(phases)
    keep(
        json,
        known=known,
        options={"repetitions": repetitions, "seconds": seconds, "images": images},
        results={"phases": [asdict(phase) for phase in phases]},
    )


if __name__ == "__main__":
    typer.run(main)
