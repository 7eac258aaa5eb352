"""The engine: a real pipeline on its own thread, asked from an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
from carso.bundle import Bundle
from carso.errors import NotReady
from carso.inference.engine import Engine, EngineDead, EngineError, EngineStopped
from carso.inference.jobs import Job, Step, VotePlan
from carso.inference.pipeline import Pipeline
from carso.inference.sessions import Sessions
from carso.inference.thread import InThread
from carso.telemetry.probes import Lifecycle, Probes

from tests.bundles import SMALL, random_images, shared_bundle

IMAGES = random_images(24)
ENDLESS = VotePlan(samples=2**60, risk=0, seed=1)  # no machine comes to its end
TIMEOUT = 60.0  # seconds: nothing may hang


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


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "carso-engine"}


@pytest.fixture
def others() -> set[threading.Thread]:
    """Threads of engines that other tests have left."""
    return engine_threads()


@pytest.fixture
async def engine(others, pipeline, steps) -> AsyncIterator[Engine]:
    engine = Engine(InThread(pipeline, observe=steps.append))
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


def cancelled(steps: list[Step]) -> int:
    """How many jobs have left without a result."""
    return sum(result is None for step in steps for _, result in step.finished)


async def test_jobs_at_the_same_time_are_all_answered_as_if_each_were_alone(engine, bundle):
    plans = [VotePlan(samples=1500, risk=risk, seed=seed) for seed in range(20) for risk in (0, 1e-3)]
    robust = [Job(IMAGES[[seed % 24]], plan) for seed, plan in enumerate(plans)]
    fast = [Job(random_images(n, seed=n)) for n in range(1, 20)]
    answered = await asyncio.wait_for(asyncio.gather(*map(engine.run, [*robust, *fast])), TIMEOUT)

    idle_sessions = Sessions(bundle, device="cpu", threads=1)
    alone = Pipeline(idle_sessions, latent=SMALL.purifier.latent, classes=SMALL.classifier.classes, round_rows=512)
    for job, result in zip([*robust, *fast], answered, strict=True):
        expected = idle_sessions.first_pass(job.images).probabilities
        np.testing.assert_allclose(result.probabilities, expected, atol=1e-6)
        assert result.outcomes == (alone.classify(job.images, job.plan) if job.plan else ())
    assert engine.in_flight == 0
    assert engine.alive


async def test_a_job_after_a_pause_is_answered_too(engine, steps):
    await engine.run(Job(IMAGES[:1]))
    await until(lambda: len(steps) == 2)  # first passes, and a round of nothing
    await asyncio.sleep(0.2)
    assert len(steps) == 2  # nothing to do, nothing done
    await asyncio.wait_for(engine.run(Job(IMAGES[:1])), TIMEOUT)


async def test_a_fast_job_is_answered_while_an_election_goes_on(engine, steps):
    election = asyncio.create_task(engine.run(Job(IMAGES[:1], ENDLESS)))
    await rounds_went_by(steps, 1)
    for _ in range(10):
        await asyncio.wait_for(engine.run(Job(IMAGES[:2])), TIMEOUT)
    assert not election.done()
    election.cancel()


async def test_the_event_loop_goes_on_while_the_engine_works(engine, steps):
    election = asyncio.create_task(engine.run(Job(IMAGES, ENDLESS)))
    for _ in range(5):
        before = len(steps)
        await rounds_went_by(steps, 2)  # the engine works
        assert len(steps) > before
        await asyncio.sleep(0)  # and so does the loop
    assert not election.done()
    election.cancel()


async def test_cancelling_the_task_that_waits_cancels_the_job(engine, steps):
    task = asyncio.create_task(engine.run(Job(IMAGES[:3], ENDLESS)))
    await rounds_went_by(steps, 3)
    assert engine.in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.in_flight == 0

    await until(lambda: cancelled(steps) == 1)  # the round in which it left
    rows = sum(step.rows for step in steps)
    await asyncio.wait_for(engine.run(Job(IMAGES[:1])), TIMEOUT)
    assert sum(step.rows for step in steps) == rows


async def test_a_timeout_of_the_caller_leaves_the_others_alone(engine):
    patient = asyncio.create_task(engine.run(Job(IMAGES[:4], VotePlan(samples=1500, risk=0, seed=2))))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.run(Job(IMAGES[:4], ENDLESS)), 0.02)
    result = await asyncio.wait_for(patient, TIMEOUT)
    assert all(outcome.ending == "exact" for outcome in result.outcomes)


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


async def test_stopping_fails_the_jobs_in_flight_and_every_later_one(engine, steps, others):
    task = asyncio.create_task(engine.run(Job(IMAGES[:1], ENDLESS)))
    await rounds_went_by(steps, 2)
    await asyncio.wait_for(engine.stop(), TIMEOUT)
    with pytest.raises(EngineError, match="stopping"):
        await asyncio.wait_for(task, TIMEOUT)
    assert not engine.alive
    with pytest.raises(EngineError, match="not running"):
        await engine.run(Job(IMAGES[:1]))
    assert engine_threads() <= others


async def test_an_idle_engine_stops_and_twice_is_no_error(engine, others):
    await asyncio.wait_for(engine.stop(), TIMEOUT)
    await asyncio.wait_for(engine.stop(), TIMEOUT)
    assert engine_threads() <= others


async def test_an_engine_that_was_never_started_refuses_jobs_and_can_be_stopped(pipeline):
    engine = Engine(InThread(pipeline))
    assert not engine.alive
    with pytest.raises(EngineError, match="not running"):
        await engine.run(Job(IMAGES[:1]))
    await engine.stop()


async def test_every_step_is_observed(engine, steps):
    result = await engine.run(Job(IMAGES, VotePlan(samples=1500, risk=1e-3, seed=5)))
    assert sum(step.rows for step in steps) == sum(outcome.votes for outcome in result.outcomes)
    assert sum(step.first_passes for step in steps) == len(IMAGES)


async def test_an_image_that_needs_one_ballot_takes_one_turn_of_the_engine_and_one_call_into_the_event_loop(
    engine, steps, monkeypatch
):
    loop = asyncio.get_running_loop()
    call, calls = loop.call_soon_threadsafe, []
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args, **named: calls.append(args) or call(*args, **named))
    await asyncio.wait_for(engine.run(Job(IMAGES[:1], VotePlan(samples=4, risk=0))), TIMEOUT)
    first, then = steps
    assert (first.first_passes, then.rows, then.elections, len(then.finished)) == (1, 4, 1, 1)
    assert len(calls) == 1


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
        await engine.run(Job(IMAGES[[image]], VotePlan(samples=1, risk=0, seed=image)))
        ended.append(turns)

    turn()
    await asyncio.wait_for(asyncio.gather(*map(ask, range(8))), TIMEOUT)
    over = True
    assert max(len(step.finished) for step in steps) == 8
    assert len(set(ended)) == 8


async def test_jobs_that_are_done_are_answered_even_if_the_engine_is_abandoned_meanwhile(engine, steps):
    jobs = [Job(IMAGES[[image]], VotePlan(samples=1, risk=0, seed=image)) for image in range(8)]
    unanswered = asyncio.create_task(engine.run(Job(IMAGES[:1], ENDLESS)))
    tasks = [asyncio.create_task(engine.run(job)) for job in jobs]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    engine.abandon()
    answered = await asyncio.wait_for(asyncio.gather(*tasks), TIMEOUT)
    assert [result.outcomes[0].seed for result in answered] == list(range(8))
    with pytest.raises(EngineStopped):
        await unanswered
    await until(lambda: cancelled(steps) == 1)  # and costs no more rows


# --- the watchdog -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def stuck(pipeline) -> AsyncIterator[Engine]:
    """In a step that does not end, and with nobody who waits for it any more."""
    release = threading.Event()
    engine = Engine(InThread(pipeline, observe=lambda step: release.wait(60) and None))
    engine.start()
    await asyncio.sleep(0.1)
    assert not engine.stalled(0.05)  # idle is not stalled
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.run(Job(IMAGES[:1])), 0.2)
    yield engine
    release.set()
    await asyncio.wait_for(engine.stop(), TIMEOUT)


async def test_the_watchdog_sees_a_step_that_does_not_end_whether_or_not_somebody_waits(stuck):
    await until(lambda: stuck.stalled(0.1))
    assert not stuck.stalled(3600)
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
    assert not engine.stalled(TIMEOUT)
    election.cancel()
    await until(lambda: cancelled(steps) == 1)
    await until(lambda: not engine.stalled(0))  # idle, and so it stays
    await asyncio.sleep(0.1)
    assert not engine.stalled(0)


async def test_an_engine_that_is_stuck_does_not_keep_the_process_from_stopping(stuck):
    waiting = asyncio.create_task(stuck.run(Job(IMAGES[:1])))
    await asyncio.sleep(0)
    await asyncio.wait_for(stuck.stop(timeout=0.1), TIMEOUT)
    with pytest.raises(EngineStopped):
        await waiting
