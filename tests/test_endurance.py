"""The books that the endurance benchmark keeps: what became of each request, and whether memory grows."""

from __future__ import annotations

import asyncio
import time
from itertools import repeat

import httpx
import numpy as np
import pytest

from benchmarks import endurance
from benchmarks.growth import HOUR, Sample, between, within
from benchmarks.outcomes import Account, Attempt, Cause, Kill, Outcome, Restart, cause_of, outcome_of
from benchmarks.servers import free_port

REQUEST = httpx.Request("POST", "http://localhost/classify")
KILLS = [Kill(at=100, replaced=103)]
RESTARTS = [Restart(told=200, ended=204, ready=206)]


@pytest.mark.parametrize(
    ("came", "outcome"),
    [
        (httpx.Response(200), Outcome.ANSWERED),
        (httpx.Response(429), Outcome.TOO_MANY),
        (httpx.Response(503), Outcome.NOT_NOW),
        (httpx.Response(500), Outcome.OTHER),
        (httpx.ReadError("reset", request=REQUEST), Outcome.BROKEN),
        (httpx.RemoteProtocolError("disconnected", request=REQUEST), Outcome.BROKEN),
        (httpx.ReadTimeout("late", request=REQUEST), Outcome.TIMEOUT),
        (httpx.ProxyError("no", request=REQUEST), Outcome.OTHER),
    ],
)
def test_every_end_of_an_attempt_has_its_place_in_the_books(came, outcome):
    assert outcome_of(came) is outcome


def test_a_port_where_nobody_listens_is_no_broken_connection():
    with pytest.raises(httpx.ConnectError) as refused:
        httpx.get(f"http://127.0.0.1:{free_port()}")
    assert outcome_of(refused.value) is Outcome.REFUSED


@pytest.mark.parametrize(
    ("began", "ended", "cause"),
    [
        (99, 100.1, Cause.KILL),
        (100.2, 100.3, Cause.KILL),  # over a connection that the kill had broken
        (98, 99.9, Cause.NONE),  # it broke before the kill
        (102, 102.1, Cause.NONE),  # a new connection, to a worker that is there
        (201, 202, Cause.STOP),
        (199, 202, Cause.NONE),  # it was sent before the service was told to stop
        (300, 301, Cause.NONE),
    ],
)
def test_a_broken_connection_counts_as_lost_unless_something_explains_it(began, ended, cause):
    assert cause_of(Attempt(began, ended, Outcome.BROKEN), KILLS, RESTARTS) is cause


def test_the_books_hold_every_request_once_and_every_attempt():
    account = Account()
    broken, refused, answered = (
        Attempt(99, 100.1, Outcome.BROKEN),
        Attempt(100.2, 100.2, Outcome.REFUSED),
        Attempt(100.4, 101, Outcome.ANSWERED),
    )
    account.add([broken, refused, answered], Outcome.ANSWERED, due=98, began=99, ended=101)
    account.add([broken], Outcome.BROKEN, due=99, began=99, ended=100.1)
    account.add([], Outcome.HANG, due=0, began=1, ended=121)
    assert account.requests == sum(account.outcomes.values()) == 3
    assert account.attempts == {Outcome.BROKEN: 2, Outcome.REFUSED: 1, Outcome.ANSWERED: 1}
    assert (account.recovered, account.longest, account.latencies) == (1, 120, [3])
    assert account.causes(KILLS, []) == {Cause.KILL: 2}
    assert account.percentile(50) == 3000


def grown(*, begins: list[float], per_hour: float, seconds: float, level: float = 0) -> list[Sample]:
    """Sizes of processes that grow, with noise of 10 kB. `level`: by how much each is larger than the one before."""
    noise = np.random.default_rng(0)
    return [
        Sample(begin + age, 10 + number, "worker", 1e8 + number * level + per_hour * age / HOUR + noise.normal(0, 1e4))
        for number, begin in enumerate(begins)
        for age in np.arange(0, seconds, 10.0)
    ]


def test_growth_within_lives_is_found_whatever_the_level_of_each():
    slope = within(grown(begins=[0, 300, 600], per_hour=6e6, seconds=300, level=2e6), warm_up=60)
    assert slope.low < 6e6 < slope.high
    assert slope.high - slope.low < 2e6
    assert (slope.processes, slope.minutes) == (3, 12)


def test_growth_from_life_to_life_is_found_where_no_life_grows():
    samples = grown(begins=[0, 300, 600, 900], per_hour=0, seconds=300, level=1e6)
    slope = between(samples, warm_up=60)
    assert slope.low < 12e6 < slope.high
    flat = within(samples, warm_up=60)
    assert flat.low < 0 < flat.high


def test_too_few_minutes_have_no_slope():
    assert np.isnan(within(grown(begins=[0], per_hour=0, seconds=150), warm_up=60).per_hour)
    assert between([], warm_up=60).processes == 0


class KeepsTheProcessor:
    """A caller beside whom the generator gets no time."""

    async def call(self, expected, *, due):
        time.sleep(0.02)
        await asyncio.sleep(60)


def test_a_generator_that_gets_too_little_time_ends_the_benchmark_with_one_line(monkeypatch):
    monkeypatch.setattr(endurance, "TOO_LATE", 0.01)
    with pytest.raises(SystemExit, match="keep other programs off this processor, or raise --attacks"):
        asyncio.run(endurance.offer([KeepsTheProcessor()], repeat(None), rate=1e4, seconds=60))
