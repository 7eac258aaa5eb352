"""One worker with all processors, against several with a share each, and against one engine for all of them:
python -m benchmarks.workers

Services with different numbers of workers run side by side, and get the same load one after the other. A ratio to one
worker is taken within one repetition, and its median over repetitions is shown. `auto` in carso.workers.placement is to
follow from this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from carso.bundle import Bundle
from carso.choices import MAX_WORKERS
from carso.inference.processors import usable_cpus

from benchmarks.digits import png_digits
from benchmarks.load import request
from benchmarks.phases import Phase, Target, measure, series
from benchmarks.report import REFERENCE, BundleFolder, JsonFile, begin, console, keep, progress_console, table
from benchmarks.servers import carso
from benchmarks.timing import spread

PATHS = {"robust": "/classify", "fast": "/classify/fast"}
CONNECTIONS = (1, 8, 32, 128)


@dataclass(frozen=True)
class Shape:
    """How a service is made of processes."""

    workers: int
    engine: str  # own, or shared by all

    def __str__(self) -> str:
        return f"{self.workers}" if self.engine == "own" else f"{self.workers}, shared engine"

    @property
    def settings(self) -> dict[str, str]:
        return {"CARSO_WORKERS": str(self.workers), "CARSO_ENGINE": self.engine}


def shapes(cpus: int) -> list[Shape]:
    """Return what is compared: one process first."""
    return [Shape(count, engine) for engine in ("own", "shared") for count in numbers(cpus)]


def numbers(cpus: int) -> list[int]:
    """Return the numbers of workers that are compared: 1, 2, 4 and so on, up to one for each processor."""
    return [count for count in (2**power for power in range(8)) if count <= min(max(2, cpus), MAX_WORKERS)]


@contextmanager
def targets(bundle: Path, compared: Sequence[Shape], *, images: int) -> Iterator[list[Target]]:
    """Run a service of each shape. A target is named by its path and its shape."""
    bodies = png_digits(images)
    with ExitStack() as stack:
        services = {
            shape: stack.enter_context(carso(bundle, CARSO_CANARY_S="0", CARSO_DEVICE="cpu", **shape.settings))
            for shape in compared
        }
        yield [
            Target(f"{name} {shape}", service, [request(path, body, content_type="image/png") for body in bodies])
            for name, path in PATHS.items()
            for shape, service in services.items()
        ]


def run(to: Sequence[Target], *, repetition: int, seconds: float) -> Iterator[Phase]:
    """Measure every target at every number of connections, beginning with another one in each repetition."""
    turn = repetition % len(to)
    for connections in CONNECTIONS:
        for target in (*to[turn:], *to[:turn]):
            load = target.load(connections=connections)
            yield measure(target, load, kind="closed", repetition=repetition, seconds=seconds)


def ratios(phases: Sequence[Phase], compared: Sequence[Shape]) -> dict[str, str]:
    """Print and return throughput and p99 of every shape, over those of the first."""
    found = {}
    shown = table(
        "workers, relative to one with all processors: medians over repetitions, with quartiles",
        *("path", "connections", "workers", "throughput", "p99", "failed"),
    )
    for path in PATHS:
        for connections in CONNECTIONS:
            for shape in compared:
                of = {"target": f"{path} {shape}", "setting": connections}
                alone = {"target": f"{path} {compared[0]}", "setting": connections}
                ratio = {
                    field: spread(np.asarray(series(phases, field, **of) / series(phases, field, **alone)), digits=3)
                    for field in ("throughput", "p99")
                }
                for field, value in ratio.items():
                    found[f"{path}, {connections} connections, workers: {shape}: {field}"] = value
                failed = str(int(series(phases, "failures", **of).sum()))
                shown.add_row(path, str(connections), str(shape), ratio["throughput"], ratio["p99"], failed)
    console.print(shown)
    return found


def main(
    *,
    bundle: BundleFolder = REFERENCE,
    repetitions: Annotated[int, typer.Option(min=1)] = 7,
    seconds: Annotated[float, typer.Option(min=0.2, help="Of one phase, after half a second's warm-up.")] = 2.5,
    images: Annotated[int, typer.Option(min=1, max=10_000, help="Different images sent.")] = 1000,
    json: JsonFile = None,
) -> None:
    known = begin("workers", Bundle.load(bundle))
    compared = shapes(usable_cpus())
    phases: list[Phase] = []
    with targets(bundle, compared, images=images) as to, progress_console.status("") as status:
        for repetition in range(repetitions):
            status.update(f"repetition {repetition + 1} of {repetitions}")
            phases += run(to, repetition=repetition, seconds=seconds)
    found = ratios(phases, compared)
    keep(
        json,
        known=known,
        options={"repetitions": repetitions, "seconds": seconds, "images": images, "workers": list(map(str, compared))},
        results={"phases": [asdict(phase) for phase in phases], "ratios": found},
    )


if __name__ == "__main__":
    typer.run(main)
