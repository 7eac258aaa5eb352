"""What became of every request, and whether a broken connection is explained by what was done to the service.

Times are seconds on one clock, that of whoever calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import httpx
import numpy as np

AFTER = 0.5  # seconds after a kill in which a request may still be sent over a connection that the kill broke


class Outcome(StrEnum):
    """What came of one attempt, and of a request with its last attempt."""

    ANSWERED = "answered"
    TOO_MANY = "429"
    NOT_NOW = "503"
    REFUSED = "refused"  # nobody listened
    BROKEN = "broken"  # the connection ended before the answer
    TIMEOUT = "timeout"  # no answer within the client's own limit
    HANG = "hang"  # the watchdog ended it
    OTHER = "other"  # any other status or error


class Cause(StrEnum):
    """Why a connection broke."""

    KILL = "kill"  # a worker was killed meanwhile
    STOP = "stop"  # the service was told to stop before the request was sent, so that nobody had accepted it
    NONE = "none"  # nothing explains it: an accepted request was lost


@dataclass(frozen=True)
class Attempt:
    began: float
    ended: float
    outcome: Outcome
    error: str = ""  # the client library's name of it


@dataclass(frozen=True)
class Kill:
    at: float  # of one worker
    replaced: float  # all workers are ready again


@dataclass(frozen=True)
class Restart:
    told: float  # SIGTERM was sent
    ended: float  # the last process of the service is gone
    ready: float  # the next one answers


def outcome_of(came: httpx.Response | httpx.RequestError) -> Outcome:
    """Say what came of one attempt."""
    match came:
        case httpx.Response(is_success=True):
            return Outcome.ANSWERED
        case httpx.Response(status_code=429):
            return Outcome.TOO_MANY
        case httpx.Response(status_code=503):
            return Outcome.NOT_NOW
        case httpx.ConnectError():
            return Outcome.REFUSED
        case httpx.NetworkError() | httpx.RemoteProtocolError():
            return Outcome.BROKEN
        case httpx.TimeoutException():
            return Outcome.TIMEOUT
        case _:
            return Outcome.OTHER


def cause_of(attempt: Attempt, kills: Sequence[Kill], restarts: Sequence[Restart]) -> Cause:
    """Explain a broken connection."""
    if any(attempt.began <= kill.at + AFTER and kill.at <= attempt.ended for kill in kills):
        return Cause.KILL
    if any(restart.told <= attempt.began <= restart.ready for restart in restarts):
        return Cause.STOP
    return Cause.NONE


@dataclass
class Account:
    """Every request of one kind of client in one phase."""

    requests: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)  # of requests
    attempts: Counter[Outcome] = field(default_factory=Counter)
    broken: list[Attempt] = field(default_factory=list)
    recovered: int = 0  # requests that were answered after a connection broke
    other_image: int = 0  # answers of another image than the one sent
    other_count: int = 0  # answers whose votes are not those that the image and the seed give
    latencies: list[float] = field(default_factory=list)  # seconds from the scheduled time, of answers
    longest: float = 0.0  # seconds from the beginning of a request to its end, whatever that was
    other: Counter[str] = field(default_factory=Counter)  # what the outcome "other" was

    def add(self, attempts: Sequence[Attempt], outcome: Outcome, *, due: float, began: float, ended: float) -> None:
        """Enter one request, once it is over. `due`: when it should have begun."""
        self.requests += 1
        self.outcomes[outcome] += 1
        self.attempts.update(attempt.outcome for attempt in attempts)
        broken = [attempt for attempt in attempts if attempt.outcome is Outcome.BROKEN]
        self.broken += broken
        self.longest = max(self.longest, ended - began)
        if outcome is Outcome.ANSWERED:
            self.latencies.append(ended - due)
            self.recovered += bool(broken)

    def causes(self, kills: Sequence[Kill], restarts: Sequence[Restart]) -> Counter[Cause]:
        """Count the broken connections by what explains them."""
        return Counter(cause_of(attempt, kills, restarts) for attempt in self.broken)

    def percentile(self, percent: float) -> float:
        """Of the latencies, in milliseconds; not a number if there was no answer."""
        return 1e3 * float(np.percentile(self.latencies, percent)) if self.latencies else float("nan")
