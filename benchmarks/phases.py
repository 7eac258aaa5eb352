"""One phase of load on one server, and all that is read off both ends of it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.load import Load, Measured, drive
from benchmarks.servers import Server


@dataclass(frozen=True)
class Target:
    """One endpoint of one server, and the requests to send there."""

    name: str
    server: Server
    requests: Sequence[bytes]

    def load(self, *, connections: int, rate: float | None = None) -> Load:
        return Load(port=self.server.port, requests=self.requests, connections=connections, rate=rate)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What came of it: rates per second, latencies in milliseconds, processor time in microseconds per answer."""

    kind: str  # closed, open, or what else ran beside it
    target: str
    setting: float  # closed: connections; open: requests a second
    repetition: int
    throughput: float
    p50: float
    p95: float
    p99: float
    failures: int
    lateness: float  # p99 of the generator's own, in milliseconds; 0 for a closed loop
    event_loop: float  # of the server's main thread
    other_threads: float  # of its other threads and child processes
    client: float  # of this process
    rows_per_round: float | None = None  # robust path only, as are the rest
    rounds_per_second: float | None = None
    votes_per_image: float | None = None
    round_ms: float | None = None


def measure(
    target: Target,
    load: Load,
    *,
    kind: str,
    repetition: int,
    seconds: float,
    warm_up: float = 0.5,
    beside: Sequence[Load] = (),
) -> Phase:
    """Run `load` on `target`, and the loads `beside` it at the same time, for `seconds` after `warm_up`."""
    served = _Counters(target.server) if "robust" in (target.name, kind.partition(" ")[0]) else None
    began, before, own = time.perf_counter(), target.server.processors(), _own_seconds()
    measured, *others = drive([load, *beside], seconds=seconds, warm_up=warm_up)
    elapsed = time.perf_counter() - began
    used, own = target.server.processors() - before, _own_seconds() - own
    answers = max(1.0, elapsed * sum(one.throughput for one in (measured, *others)))
    return Phase(
        kind=kind,
        target=target.name,
        setting=load.rate or load.connections,
        repetition=repetition,
        throughput=measured.throughput,
        p50=measured.percentile(50),
        p95=measured.percentile(95),
        p99=measured.percentile(99),
        failures=measured.failures + sum(other.failures for other in others),
        lateness=_lateness(measured),
        event_loop=1e6 * used.main_thread / answers,
        other_threads=1e6 * used.others / answers,
        client=1e6 * own / answers,
        **(served.since(elapsed) if served else {}),
    )


class _Counters:
    """What the service counts of its votes, from now on."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._before = server.metrics()

    def since(self, seconds: float) -> dict[str, float | None]:
        now = self._server.metrics()
        before = self._before

        def grown(name: str) -> float:
            return now.get(name, 0.0) - before.get(name, 0.0)

        rounds, images = grown("carso_rounds_total"), grown("carso_votes_per_image_count")
        busy = grown("carso_round_duration_seconds_sum")
        return {
            "rows_per_round": grown("carso_round_rows_sum") / rounds if rounds else None,
            "rounds_per_second": rounds / seconds,
            "votes_per_image": grown("carso_votes_per_image_sum") / images if images else None,
            "round_ms": 1e3 * busy / rounds if rounds and busy else None,
        }


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _lateness(measured: Measured) -> float:
    return 1e3 * float(np.percentile(measured.lateness, 99)) if measured.lateness else 0.0


def median(phases: Sequence[Phase], field: str, **having: object) -> float:
    """Of one field, over the phases whose fields are as `having` says; not a number where there is no value."""
    values = series(phases, field, **having)
    return float(np.median(values)) if len(values) else float("nan")


def series(phases: Sequence[Phase], field: str, **having: object) -> np.ndarray:
    """One field, in the order of repetitions."""
    chosen = [phase for phase in phases if all(getattr(phase, name) == value for name, value in having.items())]
    values = [getattr(phase, field) for phase in sorted(chosen, key=lambda phase: phase.repetition)]
    return np.array([value for value in values if value is not None])
