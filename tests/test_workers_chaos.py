"""Workers under load while they are killed and restarted: which requests are lost, and which are not."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import pytest
from carso import Client

from tests.bundles import SMALL, shared_bundle
from tests.calls import PNG, sample
from tests.server import Server, serving
from tests.test_workers import several, states, workers_of
from tests.waiting import PATIENCE, comes_to, eventually

CALLERS = 6


@dataclass
class Loss:
    began: float
    ended: float
    error: str


class Load:
    """Callers that each send one request after the other, over a new connection each."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._over = threading.Event()
        self.answered = 0
        self.losses: list[Loss] = []
        self.refusals: list[str] = []

    def call(self, caller: int) -> None:
        while not self._over.is_set():
            path = "/classify" if caller % 2 else "/classify/fast"
            began = time.monotonic()
            try:
                answer = httpx.post(f"{self._server.url}{path}", content=PNG, timeout=PATIENCE)
            except httpx.TransportError as e:
                self.losses.append(Loss(began, time.monotonic(), repr(e)))
                continue
            if answer.status_code == 200:
                self.answered += 1
            else:
                self.refusals.append(answer.text)

    def stop(self) -> None:
        self._over.set()


@pytest.mark.slow
def test_no_accepted_request_is_lost_but_those_in_flight_in_a_worker_that_is_killed(tmp_path):
    """A worker that is told to stop loses none."""
    chance = random.Random(1)
    with several(tmp_path / "log") as server, ThreadPoolExecutor(CALLERS) as pool:
        load = Load(server)
        callers = [pool.submit(load.call, caller) for caller in range(CALLERS)]
        kills: list[tuple[float, float]] = []
        try:
            for turn in range(6):
                reached = load.answered
                eventually(lambda reached=reached: load.answered > reached + 50)
                worker = chance.choice(workers_of(server))
                number = signal.SIGKILL if turn % 2 else signal.SIGTERM
                began = time.monotonic()
                os.kill(worker, number)
                eventually(lambda worker=worker: worker not in workers_of(server))
                if number == signal.SIGKILL:
                    kills.append((began, time.monotonic()))
                comes_to(lambda: states(server), {"ready": 2.0})
            reached = load.answered
            eventually(lambda: load.answered > reached + 50)
        finally:
            load.stop()
        for caller in callers:
            caller.result(PATIENCE)
        assert load.refusals == []
        for loss in load.losses:
            assert any(loss.began <= ended and began <= loss.ended for began, ended in kills), loss
        assert len(load.losses) <= len(kills) * CALLERS
        page = server.metrics()
        counted = sum(
            sample(page, f'carso_requests_total{{endpoint="{path}",status="200"}}')
            for path in ("/classify", "/classify/fast")
        )
        assert load.answered <= counted <= load.answered + len(load.losses)
        assert sample(page, "carso_worker_restarts_total") == 6
        comes_to(lambda: sample(server.metrics(), 'carso_queue_rows{path="robust"}'), 0)
        assert sample(page, 'carso_queue_rows{path="fast"}') == 0
        server.process.send_signal(signal.SIGTERM)
        assert server.leaves() == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_the_client_recovers_what_a_killed_worker_lost(tmp_path):
    with several(tmp_path / "log") as server, Client(server.url) as client:
        for _ in range(3):
            assert client.classify(PNG).predictions
            for worker in workers_of(server):  # whichever the connection is to
                os.kill(worker, signal.SIGKILL)
                eventually(lambda worker=worker: worker not in workers_of(server))
                assert client.classify(PNG).predictions
            comes_to(lambda: states(server), {"ready": 2.0})


@pytest.mark.slow
def test_a_service_whose_workers_all_die_at_once_keeps_who_connects_waiting(tmp_path):
    with several(tmp_path / "log") as server, ThreadPoolExecutor(1) as pool:
        workers = workers_of(server)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        waiting = pool.submit(httpx.post, f"{server.url}/classify/fast", content=PNG, timeout=PATIENCE)
        assert waiting.result(PATIENCE).status_code == 200
        assert not {*workers} & {*workers_of(server)}


@pytest.mark.slow
def test_a_service_that_is_told_to_stop_while_a_worker_loads_ends(tmp_path):
    with serving(shared_bundle(SMALL), tmp_path / "log", workers=2) as server:
        os.kill(workers_of(server)[0], signal.SIGKILL)
        server.process.send_signal(signal.SIGTERM)
        assert server.leaves() == 0
        assert workers_of(server) == []
