"""A closed loop of requests, to measure a service or to keep it busy.

Each connection sends its next request when its last one is answered. No request is sent twice.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from carso.client.errors import CarsoError
from carso.client.results import FastResult, RobustResult

if TYPE_CHECKING:
    from carso.client.images import Images

BACK_OFF = 0.1  # seconds after a request that got no answer: a service that does not listen need not be hammered
PERCENTILES = (50, 90, 95, 99)
LATEST = 100_000  # latencies that are kept: an endless load must not grow
ATTACK, SHARE = 1 / 3, 1 / 3  # of the period, and of the robust requests meanwhile

Send = Callable[[int], Awaitable[RobustResult | FastResult]]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a load sends: `usual` images in turn, and `attacked` ones among them for the first third of each period.

    Meanwhile a third of the robust requests are attacked ones, as if there were an attack: the paths disagree more
    often, and more votes are counted.
    """

    usual: Sequence[Images]
    attacked: Sequence[Images] = ()
    period: float = 180.0  # seconds

    def images(self, number: int, *, robust: bool, now: float) -> Images:
        """Choose the images of request `number` at time `now`, in seconds."""
        if robust and self.attacked and now / self.period % 1 < ATTACK and random.random() < SHARE:  # noqa: S311
            return random.choice(self.attacked)  # noqa: S311
        return self.usual[number % len(self.usual)]


@dataclass(kw_only=True)
class Measured:
    """What came of a load.

    Rates count what was answered with 200 before the end. Statuses and votes count everything. Latencies are those of
    the answers with 200, the latest hundred thousand.
    """

    seconds: float = 0.0
    requests: int = 0
    images: int = 0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))  # seconds
    statuses: Counter[str] = field(default_factory=Counter)  # HTTP status, or "no answer"
    voted: int = 0  # images of which the service tells the votes
    votes: int = 0  # cast for them

    def summary(self) -> dict[str, object]:
        """Return the figures for JSON: without latencies if nothing was answered, without votes if none are told."""
        summary: dict[str, object] = {
            "seconds": round(self.seconds, 3),
            "requests_per_s": round(self.requests / self.seconds, 2) if self.seconds else 0.0,
            "images_per_s": round(self.images / self.seconds, 2) if self.seconds else 0.0,
        }
        if self.latencies:
            ms = sorted(1e3 * latency for latency in self.latencies)
            quantiles = {f"p{percent}": _percentile(ms, percent) for percent in PERCENTILES} | {"max": ms[-1]}
            summary["latency_ms"] = {name: round(value, 3) for name, value in quantiles.items()}
        summary["statuses"] = dict(sorted(self.statuses.items()))
        if self.voted:
            summary["votes_per_image"] = round(self.votes / self.voted, 2)
        return summary


async def drive(
    send: Send,
    measured: Measured,
    *,
    connections: int,
    seconds: float,
    pause: float = 0.0,
    complain: Callable[[str], None] = lambda message: None,
) -> None:
    """Keep `connections` calls of `send` in flight for `seconds`, await the last ones, and note what came of them.

    `send` gets a number of its own for each request, from 0, and must not retry. `seconds` may be infinite: cancel it,
    and `measured` has what came until then. `pause`: seconds that a connection waits between two requests, on average.
    `complain` is called with the first error of each status.
    """
    numbers = count()
    began = time.perf_counter()
    end = began + seconds

    async def connection() -> None:
        while (sent := time.perf_counter()) < end:
            try:
                result = await send(next(numbers))
            except CarsoError as e:
                status = str(e.status or "no answer")
                if not measured.statuses[status]:
                    complain(str(e))
                measured.statuses[status] += 1
                if e.status is None:
                    await asyncio.sleep(BACK_OFF)
            else:
                now = time.perf_counter()
                _note(result, measured, latency=now - sent, in_time=now < end)
            if pause:
                await asyncio.sleep(random.uniform(0, 2 * pause))  # noqa: S311

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(connection())
    finally:
        measured.seconds = min(seconds, time.perf_counter() - began)


def _note(result: RobustResult | FastResult, measured: Measured, *, latency: float, in_time: bool) -> None:
    measured.statuses["200"] += 1
    measured.latencies.append(latency)
    if isinstance(result, RobustResult):
        told = [p.votes for p in result.predictions if p.votes is not None]
        measured.voted += len(told)
        measured.votes += sum(told)
    if in_time:
        measured.requests += 1
        measured.images += len(result.predictions)


def random_npy(shape: tuple[int, ...], *, seed: int) -> bytes:
    """Make a .npy file of random uint8 values without NumPy, which the client does not need otherwise.

    https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    """
    size = 1
    for length in shape:
        size *= length
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape!r}, }}"
    padding = -(10 + len(header) + 1) % 64
    written = f"{header}{' ' * padding}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(written).to_bytes(2, "little") + written + random.Random(seed).randbytes(size)  # noqa: S311


def _percentile(ascending: Sequence[float], percent: float) -> float:
    """Interpolate between the two nearest values."""
    position = (len(ascending) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (ascending[above] - ascending[below]) * (position - below)
