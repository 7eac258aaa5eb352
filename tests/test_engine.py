"""The engine: a real pipeline on its own thread, asked from an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
from carso.bundle import Bundle
from carso.errors import NotReady
from carso.http.server import Lifecycle
from carso.inference.engine import Engine, EngineDead, EngineError, EngineStopped
from carso.inference.pipeline import Ballot, Job, Pipeline, Step
from carso.inference.sessions import Sessions
from carso.telemetry.probes import Probes

from tests.bundles import SMALL, random_images, shared_bundle

IMAGES = random_images(24)
ENDLESS = Ballot(samples=2_000_000, risk=0, seed=1)  # longer than any test waits
TIMEOUT = 20.0  # seconds: nothing may hang


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(shared_bundle())


@pytest.fixture
def sessions(bundle) -> Sessions:
    return Sessions(bundle, device="cpu", threads=1)


@pytest.fixture
def pipeline(sessions) -> Pipeline:
    return Pipeline(sessions, latent=SMALL.purifier.latent, classes=SMALL.classifier.classes, round_rows=256)


@pytest.fixture
def steps() -> list[Step]:
    return []


@pytest.fixture
async def engine(pipeline, steps) -> AsyncIterator[Engine]:
    engine = Engine(pipeline, observe=steps.append)
    engine.start()
    yield engine
    await asyncio.wait_for(engine.stop(), TIMEOUT)


async def rounds_went_by(steps: list[Step], count: int) -> None:
    start = len(steps)
    await until(lambda: len(steps) >= start + count)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.001)


async def test_jobs_at_the_same_time_are_all_answered_as_if_each_were_alone(engine, bundle):
    ballots = [Ballot(samples=1500, risk=risk, seed=seed) for seed in range(20) for risk in (0, 1e-3)]
    robust = [Job(IMAGES[[seed % 24]], ballot) for seed, ballot in enumerate(ballots)]
    fast = [Job(random_images(n, seed=n)) for n in range(1, 20)]
    answered = await asyncio.wait_for(asyncio.gather(*map(engine.run, [*robust, *fast])), TIMEOUT)
    assert answered == [*robust, *fast]

    idle_sessions = Sessions(bundle, device="cpu", threads=1)
    alone = Pipeline(idle_sessions, latent=SMALL.purifier.latent, classes=SMALL.classifier.classes, round_rows=512)
    for job in robust:
        assert job.outcomes == alone.classify(job.images, job.ballot)
    for job in fast:
        expected = idle_sessions.first_pass(job.images).probabilities
        np.testing.assert_allclose(job.probabilities, expected, atol=1e-6)
    assert engine.in_flight == 0
    assert engine.alive


async def test_a_job_after_a_pause_is_answered_too(engine, steps):
    await engine.run(Job(IMAGES[:1]))
    idle = len(steps)
    await asyncio.sleep(0.2)
    assert len(steps) == idle  # nothing to do, nothing done
    await asyncio.wait_for(engine.run(Job(IMAGES[:1])), TIMEOUT)


async def test_a_fast_job_is_answered_while_an_election_goes_on(engine):
    election = asyncio.create_task(engine.run(Job(IMAGES[:1], ENDLESS)))
    await asyncio.sleep(0.05)
    for _ in range(10):
        await asyncio.wait_for(engine.run(Job(IMAGES[:2])), TIMEOUT)
    assert not election.done()
    election.cancel()


async def test_the_event_loop_goes_on_while_the_engine_works(engine, steps):
    election = asyncio.create_task(engine.run(Job(IMAGES, ENDLESS)))
    await rounds_went_by(steps, 1)
    ticks, start = 0, time.monotonic()
    while time.monotonic() < start + 0.3:
        await asyncio.sleep(0.001)
        ticks += 1
    assert ticks > 20
    election.cancel()


async def test_cancelling_the_task_that_waits_cancels_the_job(engine, steps):
    job = Job(IMAGES[:3], ENDLESS)
    task = asyncio.create_task(engine.run(job))
    await rounds_went_by(steps, 3)
    assert engine.in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert job.cancelled
    assert engine.in_flight == 0

    await asyncio.wait_for(engine.run(Job(IMAGES[:1])), TIMEOUT)  # the round in which it left
    rows = sum(step.rows for step in steps)
    await asyncio.sleep(0.1)
    assert sum(step.rows for step in steps) == rows
    assert job in [job for step in steps for job in step.finished]
    assert job.open == 0


async def test_a_timeout_of_the_caller_leaves_the_others_alone(engine):
    patient = asyncio.create_task(engine.run(Job(IMAGES[:4], Ballot(samples=1500, risk=0, seed=2))))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.run(Job(IMAGES[:4], ENDLESS)), 0.02)
    job = await asyncio.wait_for(patient, TIMEOUT)
    assert all(outcome.rule == "exact" for outcome in job.outcomes)


@pytest.mark.parametrize("broken", ["first_pass", "vote"])
async def test_a_device_that_fails_mid_round_fails_every_job_in_flight_and_every_later_one(
    engine, steps, sessions, monkeypatch, broken
):
    running = [asyncio.create_task(engine.run(Job(IMAGES[:2], ENDLESS))) for _ in range(5)]
    await rounds_went_by(steps, 2)
    assert engine.alive

    def fails(*arguments):
        raise RuntimeError("CUDA error 700: an illegal memory access was encountered")

    monkeypatch.setattr(sessions, broken, fails)
    running += [asyncio.create_task(engine.run(Job(IMAGES[:1]))) for _ in range(5)]
    answers = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), TIMEOUT)
    failed = [answer for answer in answers if isinstance(answer, EngineError)]
    assert len(failed) >= 5 if broken == "vote" else len(failed) == 10  # a fast job needs no votes
    assert all("CUDA error 700" in str(answer) for answer in failed)
    assert not engine.alive
    assert engine.in_flight == 0
    with pytest.raises(EngineDead, match="CUDA error 700"):
        await asyncio.wait_for(engine.run(Job(IMAGES[:1])), TIMEOUT)
    await asyncio.wait_for(engine.stop(), TIMEOUT)


async def test_stopping_fails_the_jobs_in_flight_and_every_later_one(engine, steps):
    task = asyncio.create_task(engine.run(Job(IMAGES[:1], ENDLESS)))
    await rounds_went_by(steps, 2)
    await asyncio.wait_for(engine.stop(), TIMEOUT)
    with pytest.raises(EngineError, match="stopping"):
        await asyncio.wait_for(task, TIMEOUT)
    assert not engine.alive
    with pytest.raises(EngineError, match="not running"):
        await engine.run(Job(IMAGES[:1]))
    assert not [thread for thread in threading.enumerate() if thread.name == "carso-engine"]


async def test_an_idle_engine_stops_at_once_and_twice_is_no_error(engine):
    start = time.monotonic()
    await asyncio.wait_for(engine.stop(), TIMEOUT)
    await asyncio.wait_for(engine.stop(), TIMEOUT)
    assert time.monotonic() - start < 2


async def test_an_engine_that_was_never_started_refuses_jobs_and_can_be_stopped(pipeline):
    engine = Engine(pipeline)
    assert not engine.alive
    with pytest.raises(EngineError, match="not running"):
        await engine.run(Job(IMAGES[:1]))
    await engine.stop()


async def test_every_step_is_observed(engine, steps):
    job = await engine.run(Job(IMAGES, Ballot(samples=1500, risk=1e-3, seed=5)))
    assert sum(step.rows for step in steps) == sum(outcome.votes for outcome in job.outcomes)
    assert sum(step.first_passes for step in steps) == len(IMAGES)


async def test_the_event_loop_goes_on_between_the_answers_of_one_round(engine, steps):
    turns = 0
    ended = []
    over = False

    def turn() -> None:
        nonlocal turns
        turns += 1
        if not over:
            asyncio.get_running_loop().call_soon(turn)

    async def ask(image: int) -> None:
        await engine.run(Job(IMAGES[[image]], Ballot(samples=1, risk=0, seed=image)))
        ended.append(turns)

    turn()
    await asyncio.wait_for(asyncio.gather(*map(ask, range(8))), TIMEOUT)
    over = True
    assert max(len(step.finished) for step in steps) == 8
    assert len(set(ended)) == 8


async def test_jobs_that_are_done_are_answered_even_if_the_engine_is_abandoned_meanwhile(engine, steps):
    jobs = [Job(IMAGES[[image]], Ballot(samples=1, risk=0, seed=image)) for image in range(8)]
    endless = Job(IMAGES[:1], ENDLESS)
    unanswered = asyncio.create_task(engine.run(endless))
    tasks = [asyncio.create_task(engine.run(job)) for job in jobs]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    engine.abandon()
    assert await asyncio.wait_for(asyncio.gather(*tasks), TIMEOUT) == jobs
    with pytest.raises(EngineStopped):
        await unanswered
    await until(lambda: endless in [job for step in steps for job in step.finished])  # and costs no more rows


# --- the watchdog -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def stuck(pipeline) -> AsyncIterator[Engine]:
    """In a step that does not end, and with nobody who waits for it any more."""
    release = threading.Event()
    engine = Engine(pipeline, observe=lambda step: release.wait(60) and None)
    engine.start()
    await asyncio.sleep(0.1)
    assert not engine.stalled(0.05)  # idle is not stalled
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.run(Job(IMAGES[:1])), 0.2)
    yield engine
    release.set()
    await asyncio.wait_for(engine.stop(), TIMEOUT)


async def test_the_watchdog_sees_a_step_that_does_not_end_whether_or_not_somebody_waits(stuck):
    assert stuck.stalled(0.1)
    assert not stuck.stalled(60)
    waiting = asyncio.create_task(stuck.run(Job(IMAGES[:1])))
    await asyncio.sleep(0)
    assert stuck.stalled(0.1)
    waiting.cancel()
    probes = Probes(stuck, Lifecycle(), watchdog=0.1)
    for probe in (probes.live, probes.ready):
        with pytest.raises(NotReady, match=r"did none for 0\.1 s"):
            probe()


async def test_the_watchdog_is_content_with_an_engine_that_works(engine, steps):
    election = asyncio.create_task(engine.run(Job(IMAGES, ENDLESS)))
    await rounds_went_by(steps, 20)
    assert not engine.stalled(1)
    election.cancel()
    await asyncio.sleep(0.3)
    assert not engine.stalled(0.1)


async def test_an_engine_that_is_stuck_does_not_keep_the_process_from_stopping(stuck):
    waiting = asyncio.create_task(stuck.run(Job(IMAGES[:1])))
    await asyncio.sleep(0)
    await asyncio.wait_for(stuck.stop(timeout=0.1), TIMEOUT)
    with pytest.raises(EngineStopped):
        await waiting
