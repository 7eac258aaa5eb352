"""A closed loop of requests, to measure a service: each connection sends its next request when its last is answered.

No request is sent twice.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from carso.client.errors import CarsoError
from carso.client.results import FastResult, RobustResult

PAUSE = 0.1  # seconds after a request that got no answer: who does not listen need not be hammered
PERCENTILES = (50, 90, 95, 99)

Send = Callable[[int], Awaitable[RobustResult | FastResult]]


@dataclass(kw_only=True)
class Measured:
    """What came of a load. Rates count what was answered with 200 before the end; latencies, codes and votes all."""

    seconds: float
    requests: int = 0
    images: int = 0
    latencies: list[float] = field(default_factory=list)  # seconds, of the answers with 200
    codes: Counter[str] = field(default_factory=Counter)  # HTTP status, or "no answer"
    votes: list[int] = field(default_factory=list)  # of each image, where the service tells
    first_error: str | None = None

    def summary(self) -> dict[str, object]:
        """For JSON; without latencies if there was no answer, and without votes if nobody told them."""
        summary: dict[str, object] = {
            "seconds": self.seconds,
            "requests_per_s": round(self.requests / self.seconds, 2),
            "images_per_s": round(self.images / self.seconds, 2),
        }
        if self.latencies:
            ms = 1e3 * np.array(self.latencies)
            of = {f"p{percent}": float(np.percentile(ms, percent)) for percent in PERCENTILES} | {
                "max": float(ms.max())
            }
            summary["latency_ms"] = {name: round(value, 3) for name, value in of.items()}
        summary["codes"] = dict(sorted(self.codes.items()))
        if self.votes:
            summary["votes_per_image"] = round(float(np.mean(self.votes)), 2)
        return summary


async def drive(send: Send, *, connections: int, seconds: float) -> Measured:
    """Keep `connections` calls of `send` in flight for `seconds`, and await the last ones. `send` gets a number of its
    own for each request, from 0; it must not retry."""
    measured = Measured(seconds=seconds)
    numbers = count()
    end = time.perf_counter() + seconds

    async def connection() -> None:
        while (began := time.perf_counter()) < end:
            try:
                result = await send(next(numbers))
            except CarsoError as e:
                measured.codes[str(e.status or "no answer")] += 1
                measured.first_error = measured.first_error or str(e)
                if e.status is None:
                    await asyncio.sleep(PAUSE)
                continue
            now = time.perf_counter()
            measured.codes["200"] += 1
            measured.latencies.append(now - began)
            if isinstance(result, RobustResult):
                measured.votes += [p.votes for p in result.predictions if p.votes is not None]
            if now < end:
                measured.requests += 1
                measured.images += len(result.predictions)

    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(connection())
    return measured
