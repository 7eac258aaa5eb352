"""Admission by rows of work: the arithmetic, in the engine, and over HTTP."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from carso.bundle import Bundle
from carso.inference.admission import Admission, QueueFull
from carso.inference.engine import Engine
from carso.inference.jobs import Job, VotePlan
from carso.inference.pipeline import Pipeline
from carso.inference.sessions import Sessions
from carso.inference.thread import InThread

from tests import calls
from tests.bundles import SMALL, random_images, shared_bundle
from tests.calls import BATCH, as_npy, as_png, refused, sample, under_way
from tests.waiting import comes_to

ENDLESS = VotePlan(samples=2**60, risk=0, seed=1)


def test_work_is_admitted_up_to_the_limit_and_again_when_some_is_settled():
    admission = Admission(100)
    admission.admit(60)
    admission.admit(40)
    with pytest.raises(QueueFull, match="100 rows of work are owed"):
        admission.admit(1)
    admission.settle(30, seconds=1)
    admission.admit(30)
    assert admission.owed == 100


def test_the_wait_follows_from_the_queue_and_the_measured_pace():
    admission = Admission(1000)
    admission.admit(1000)
    assert (admission.pace, admission.wait) == (0, 0)
    for _ in range(50):
        admission.settle(10, seconds=0.1)
    assert admission.pace == pytest.approx(100)
    assert admission.wait == pytest.approx(500 / 100)
    with pytest.raises(QueueFull) as full:
        admission.check(1000)
    assert full.value.wait == pytest.approx((500 + 1000 - 1000) / 100)


def test_a_first_pass_alone_says_nothing_of_the_pace():
    admission = Admission(50_001)
    admission.admit(50_001)
    admission.settle(1, seconds=0.005)
    assert (admission.pace, admission.wait) == (0, 0)
    with pytest.raises(QueueFull) as full:
        admission.check(50_001)
    assert full.value.wait == 1


def test_a_caller_is_told_to_wait_between_a_second_and_a_minute():
    admission = Admission(10**9)
    admission.admit(10**9)
    admission.settle(10, seconds=1)
    for rows, wait in {11: 1, 10**8: 60}.items():
        with pytest.raises(QueueFull) as full:
            admission.check(rows)
        assert full.value.wait == wait


async def test_the_robust_path_may_be_full_while_the_fast_path_is_not():
    sessions = Sessions(Bundle.load(shared_bundle(SMALL)), device="cpu", threads=1)
    pipeline = Pipeline(sessions, latent=SMALL.purifier.latent, classes=SMALL.classifier.classes, round_rows=128)
    engine = Engine(InThread(pipeline), queue_rows={"robust": 2**60 + 2**59, "fast": 2})
    engine.start()
    try:
        images = random_images(3)
        first = asyncio.create_task(engine.run(Job(images[:1], ENDLESS)))
        async with asyncio.timeout(60):
            while not 0 < engine.admission["robust"].owed < 2**60:  # what was cast is owed no longer
                await asyncio.sleep(0.001)
        with pytest.raises(QueueFull):
            await engine.run(Job(images[:1], ENDLESS))
        with pytest.raises(QueueFull):
            await engine.run(Job(images))
        await asyncio.wait_for(engine.run(Job(images[:2])), 60)
        first.cancel()
        for plan in (VotePlan(samples=1500, risk=1e-3), VotePlan(samples=1500, risk=0)):
            await asyncio.wait_for(engine.run(Job(images, plan)), 60)
        async with asyncio.timeout(60):
            while [admission.owed for admission in engine.admission.values()] != [0, 0]:
                await asyncio.sleep(0.001)
    finally:
        await engine.stop()


def test_a_full_service_answers_429_with_a_time_to_come_back(endless_server, endless_client):
    def shown(name: str) -> float:
        return sample(endless_server.metrics(), name)

    def ask(_) -> httpx.Response:
        return as_npy("/classify", endless_client, BATCH, **calls.ENDLESS)

    rejections = 'carso_rejections_total{reason="overloaded"}'
    before = shown(rejections)
    with under_way(endless_server), ThreadPoolExecutor(12) as pool:
        for answer in pool.map(ask, range(12)):
            refused(answer, 429, "overloaded")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert as_png("/classify", endless_client).status_code == 200
    comes_to(lambda: shown(rejections), before + 12)
    comes_to(lambda: shown('carso_queue_rows{path="robust"}'), 0)
    assert shown('carso_queue_limit_rows{path="robust"}') == 64 * 100_001
