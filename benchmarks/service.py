"""The service under load, over HTTP: python -m benchmarks.service

The real server and a bare FastAPI endpoint that decodes the same images, each a process of its own, the load generator
a third. Phases are short and interleaved; a ratio is taken within one repetition, and its median over repetitions is
shown. Set CARSO_* in the environment to measure the service with other settings.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from carso.bundle import Bundle

from benchmarks.digits import png_digits
from benchmarks.load import drive, request
from benchmarks.phases import Phase, Target, measure, median, series
from benchmarks.report import REFERENCE, BundleFolder, JsonFile, begin, console, keep, progress_console, table
from benchmarks.servers import carso, running
from benchmarks.timing import spread

CONCURRENCIES = (1, 8, 32, 128)
SATURATED = 32  # connections at which capacity is taken
OPEN_RATES = (0.25, 0.5, 0.75, 0.9)  # of each endpoint's own capacity
PROBE_RATE = 0.1  # of the fast path's capacity: the fast requests whose latency is watched under robust load
OPEN_CONNECTIONS = 512
STAGES = ("decode_ms", "queue_ms", "first_pass_ms", "vote_ms")


@dataclass(frozen=True)
class Targets:
    robust: Target
    fast: Target
    bare: Target

    def in_turn(self, repetition: int) -> list[Target]:
        every = [self.robust, self.fast, self.bare]
        turn = repetition % len(every)
        return every[turn:] + every[:turn]


@contextmanager
def targets(bundle: Path, *, images: int) -> Iterator[Targets]:
    bodies = png_digits(images)

    def to(path: str) -> list[bytes]:
        return [request(path, body, content_type="image/png") for body in bodies]

    with carso(bundle) as service, running("benchmarks.bare", str(bundle), "{port}", ready="/readyz") as bare:
        yield Targets(
            robust=Target("robust", service, to("/classify")),
            fast=Target("fast", service, to("/classify/fast")),
            bare=Target("bare", bare, to("/decode")),
        )


def closed(to: Targets, *, repetition: int, seconds: float) -> list[Phase]:
    return [
        measure(target, target.load(connections=connections), kind="closed", repetition=repetition, seconds=seconds)
        for connections in CONCURRENCIES
        for target in to.in_turn(repetition)
    ]


def opened(to: Targets, capacity: dict[str, float], *, repetition: int, seconds: float) -> list[Phase]:
    return [
        measure(
            target,
            target.load(connections=OPEN_CONNECTIONS, rate=share * capacity[target.name]),
            kind=f"open {share:.0%}",
            repetition=repetition,
            seconds=seconds,
        )
        for share in OPEN_RATES
        for target in to.in_turn(repetition)
    ]


def mixed(to: Targets, capacity: dict[str, float], *, repetition: int, seconds: float) -> list[Phase]:
    """A few fast requests, alone and beside robust load on the same server."""
    robust = to.robust.load
    beside = {
        "alone": [],
        "robust 50% beside": [robust(connections=OPEN_CONNECTIONS, rate=capacity["robust"] / 2)],
        f"robust x{SATURATED} beside": [robust(connections=SATURATED)],
    }
    probe = to.fast.load(connections=OPEN_CONNECTIONS, rate=PROBE_RATE * capacity["fast"])
    return [
        measure(to.fast, probe, kind=kind, repetition=repetition, seconds=seconds, beside=loads)
        for kind, loads in beside.items()
    ]


def stages(to: Targets, *, seconds: float) -> dict[str, dict[str, float]]:
    """Where the time of a request goes on an idle service: median milliseconds of each stage, by endpoint."""
    found = {}
    for target in (to.robust, to.fast):
        (measured,) = drive([target.load(connections=1)], seconds=seconds, keep_bodies=True)
        timings = [jsonlib.loads(body)["timings"] for body in measured.bodies]
        spent = {stage: float(np.median([timing.get(stage, 0.0) for timing in timings])) for stage in STAGES}
        whole = float(np.median([timing["total_ms"] for timing in timings]))
        spent["rest of the handler"] = whole - sum(spent.values())
        spent["HTTP, sockets, client"] = measured.percentile(50) - whole
        found[target.name] = spent
    return found


def show(phases: Sequence[Phase]) -> None:
    shown = table(
        "medians over repetitions; latencies from the scheduled time, in ms; processor time per answer, in µs",
        *("load", "endpoint", "asked/s", "done/s", "p50", "p95", "p99", "rows/round", "votes/image"),
        *("loop", "threads", "client", "failed"),
    )
    rows = list(dict.fromkeys((phase.kind, phase.target, phase.setting) for phase in phases))
    for place, (kind, target, setting) in enumerate(rows):
        chosen = {"kind": kind, "target": target, "setting": setting}

        def of(field: str, digits: int = 0, chosen: dict[str, object] = chosen) -> str:
            value = median(phases, field, **chosen)
            return "" if np.isnan(value) else f"{value:.{digits}f}"

        load = f"closed x{setting:.0f}" if kind == "closed" else kind
        shown.add_row(
            load,
            target,
            "" if kind == "closed" else f"{setting:.0f}",
            of("throughput"),
            *(of(percentile, 2) for percentile in ("p50", "p95", "p99")),
            *(of(field, 1) for field in ("rows_per_round", "votes_per_image")),
            *(of(field) for field in ("event_loop", "other_threads", "client")),
            str(int(series(phases, "failures", **chosen).sum())),
            end_section=place + 1 < len(rows) and rows[place + 1][1] == rows[0][1],
        )
    console.print(shown)


def show_ratios(phases: Sequence[Phase]) -> dict[str, str]:
    """Print and return the ratios that matter."""

    def of(field: str, over: str, under: str, connections: int) -> np.ndarray:
        same = {"kind": "closed", "setting": connections}
        ratio: np.ndarray = series(phases, field, target=over, **same) / series(phases, field, target=under, **same)
        return ratio

    found = {}
    for connections in CONCURRENCIES:
        found[f"throughput, robust / fast, {connections} connections"] = spread(
            of("throughput", "robust", "fast", connections), digits=3
        )
        found[f"throughput, fast / bare, {connections} connections"] = spread(
            of("throughput", "fast", "bare", connections), digits=3
        )
    found["p50, robust / fast, alone"] = spread(of("p50", "robust", "fast", 1))
    alone = series(phases, "p99", kind="alone")
    for kind in dict.fromkeys(phase.kind for phase in phases if phase.kind.startswith("robust")):
        found[f"{kind}: p99 of fast, less its own alone, ms"] = spread(series(phases, "p99", kind=kind) - alone)
        rounds = series(phases, "round_ms", kind=kind)
        if len(rounds):
            found[f"{kind}: two rounds, ms"] = spread(2 * rounds)
    shown = table("ratios within one repetition: medians, with quartiles", "what", "ratio")
    for what, ratio in found.items():
        shown.add_row(what, ratio)
    console.print(shown)
    return found


def show_stages(spent: dict[str, dict[str, float]]) -> None:
    names = list(spent)
    shown = table("one request at a time: median ms", "stage", *names)
    for stage in spent[names[0]]:
        shown.add_row(stage.removesuffix("_ms").replace("_", " "), *(f"{spent[name][stage]:.3f}" for name in names))
    console.print(shown)


def main(
    *,
    bundle: BundleFolder = REFERENCE,
    repetitions: Annotated[int, typer.Option(min=1)] = 5,
    seconds: Annotated[float, typer.Option(min=0.2, help="Of one phase, after half a second's warm-up.")] = 2.5,
    images: Annotated[int, typer.Option(min=1, max=10_000, help="Different images sent.")] = 1000,
    json: JsonFile = None,
) -> None:
    known = begin("service", Bundle.load(bundle))
    phases: list[Phase] = []
    with targets(bundle, images=images) as to, progress_console.status("") as status:
        for repetition in range(repetitions):
            status.update(f"closed loop, repetition {repetition + 1} of {repetitions}")
            phases += closed(to, repetition=repetition, seconds=seconds)
        capacity = {
            target.name: median(phases, "throughput", target=target.name, setting=SATURATED) for target in to.in_turn(0)
        }
        for repetition in range(repetitions):
            status.update(f"open loop, repetition {repetition + 1} of {repetitions}")
            phases += opened(to, capacity, repetition=repetition, seconds=seconds)
            phases += mixed(to, capacity, repetition=repetition, seconds=2 * seconds)
        spent = stages(to, seconds=seconds)
    show(phases)
    show_stages(spent)
    ratios = show_ratios(phases)
    keep(
        json,
        known=known,
        options={"repetitions": repetitions, "seconds": seconds, "images": images},
        results={"phases": [asdict(phase) for phase in phases], "stages": spent, "ratios": ratios},
    )


if __name__ == "__main__":
    typer.run(main)
