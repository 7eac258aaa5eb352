"""How the service ends: in good order when asked to, and plainly when its engine fails."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
from carso.app import build
from carso.inference.sessions import Sessions
from carso.settings import Settings, SettingsError

from tests.bundles import SMALL, copy_of, shared_bundle
from tests.calls import BATCH, ENDLESS, FEW, PNG, VALUES, as_npy, as_png, in_flight, request, sample, started_body
from tests.lifespan import started
from tests.paced import building
from tests.server import COMMAND, Server, environment, serving
from tests.signals import catches
from tests.waiting import PATIENCE, PAUSE, comes_to, eventually


def test_a_restart_under_load_loses_no_request(tmp_path):
    """As a balancer does it: requests go to the new server as soon as the old one is seen not to be ready.

    The delay is far longer than that takes; a second signal ends it.
    """
    bundle = shared_bundle(SMALL)
    with serving(bundle, tmp_path / "old", drain_delay_s=3600) as old, serving(bundle, tmp_path / "new") as new:
        moved, over = threading.Event(), threading.Event()
        statuses: dict[str, list[int]] = {name: [] for name in ("before", "while it drains", "after")}

        def load(_):
            with old.client() as to_old, new.client() as to_new:
                while not over.is_set():
                    draining, to = ("after", to_new) if moved.is_set() else (phase, to_old)
                    statuses[draining].append(as_png("/classify", to, risk=0).status_code)

        phase = "before"
        with ThreadPoolExecutor(4) as pool:
            loads = [pool.submit(load, index) for index in range(4)]
            try:
                eventually(lambda: len(statuses["before"]) > 20)
                old.process.send_signal(signal.SIGTERM)
                with old.client() as client:
                    refusal = eventually(lambda: (answer := client.get("/readyz")).status_code != 200 and answer)
                    assert (refusal.status_code, refusal.json()["error"]) == (503, "not_ready")
                    phase = "while it drains"
                    answered = as_png("/classify", client)
                    assert (answered.status_code, answered.headers["connection"]) == (200, "close")
                    assert client.get("/livez").status_code == 200
                eventually(lambda: len(statuses["while it drains"]) > 20)
                moved.set()
                # 5 of each of the four: none has a request left at the old one
                eventually(lambda: len(statuses["after"]) > 20)
                comes_to(lambda: in_flight(old), 0)
                old.process.send_signal(signal.SIGTERM)
                assert old.leaves() == 0
                reached = len(statuses["after"])
                eventually(lambda: len(statuses["after"]) > reached + 20)
            finally:
                over.set()
        for ended in loads:
            ended.result()
    assert {status for found in statuses.values() for status in found} == {200}
    assert "Traceback" not in (tmp_path / "old").read_text()


def test_a_server_with_a_delay_stays_as_long_and_then_leaves_by_itself(tmp_path):
    with serving(shared_bundle(SMALL), tmp_path / "log", drain_delay_s=0.5) as server:
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.leaves() == 0
        assert time.monotonic() - began >= 0.5


def test_what_does_not_finish_in_time_is_told_so(tmp_path):
    limits = {"max_samples": 100_000, "queue_rows": 10_000_000, "drain_timeout_s": 0.3}
    with serving(shared_bundle(SMALL), tmp_path / "log", per_second=20_000, **limits) as server:
        with (
            ThreadPoolExecutor(1) as pool,
            server.client() as client,
            started_body(server, "/classify", 1000) as unfinished,
        ):
            waiting = pool.submit(as_npy, "/classify", client, BATCH, **ENDLESS)
            comes_to(lambda: in_flight(server), 1)
            server.process.send_signal(signal.SIGTERM)
            answer = waiting.result(PATIENCE)
            assert (answer.status_code, answer.json()["error"]) == (503, "not_ready")
            assert answer.headers["retry-after"] == "1"
            told = b"".join(iter(lambda: unfinished.recv(65536), b""))
            assert told.startswith(b"HTTP/1.1 503")
            assert b'"error":"not_ready"' in told
            assert b"x-request-id" in told
        assert server.leaves() == 0
    assert "Traceback" not in server.log.read_text()
    assert server.log.read_text().count('"status":503') == 2


def test_what_is_in_flight_when_the_port_closes_is_answered_by_its_deadline(tmp_path):
    limits = {"max_samples": 100_000, "queue_rows": 10_000_000}
    for deadline_ms in (1000, 4000, 16_000):  # until it leaves a slow machine the time to close the port
        with (
            serving(shared_bundle(SMALL), tmp_path / "log", per_second=20_000, **limits) as server,
            ThreadPoolExecutor(2) as pool,
            server.client() as one,
            server.client() as other,
        ):
            late = pool.submit(as_npy, "/classify", one, FEW, **ENDLESS, deadline_ms=deadline_ms)
            sound = pool.submit(as_npy, "/classify", other, FEW, samples=1500, risk=0)
            while not late.done() and in_flight(server) < 2:
                time.sleep(PAUSE)
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: refuses_connections(server))
            if late.done():
                continue
            assert sound.result(PATIENCE).status_code == 200
            assert late.result(PATIENCE).status_code == 200
            assert not all(prediction["complete"] for prediction in late.result().json()["predictions"])
            assert server.leaves() == 0
            return
    raise AssertionError("the port never closed before the deadline")


def test_a_request_whose_head_is_on_its_way_when_the_port_closes_is_answered(tmp_path):
    """On a new connection, and on one that had an answer before."""
    whole = request("/classify/fast", PNG, content_type="image/png")
    with serving(shared_bundle(SMALL), tmp_path / "log") as server, server.connect() as new, server.connect() as used:
        used.sendall(whole)
        with used.makefile("rb") as reader:
            head = b"".join(iter(reader.readline, b"\r\n"))
            assert head.startswith(b"HTTP/1.1 200")
            reader.read(int(re.search(rb"content-length: (\d+)", head)[1]))
        for connection in (new, used):
            connection.sendall(whole[:20])
        with server.client() as client:
            assert as_png("/classify/fast", client).status_code == 200  # by now, what was sent before was read
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: refuses_connections(server))
        for connection in (new, used):
            connection.sendall(whole[20:])
            told = b"".join(iter(lambda connection=connection: connection.recv(65536), b""))
            assert told.startswith(b"HTTP/1.1 200")
            assert b"connection: close" in told
        assert server.leaves() == 0


def test_what_was_sent_before_the_signal_is_answered_even_if_the_server_had_not_looked_yet(tmp_path):
    """On connections that it had not taken yet, and on one that it had and that was idle."""
    whole = request("/classify/fast", PNG, content_type="image/png")
    with serving(shared_bundle(SMALL), tmp_path / "log") as server, ExitStack() as connections:
        used = connections.enter_context(server.connect())
        used.sendall(whole)
        with used.makefile("rb") as reader:
            head = b"".join(iter(reader.readline, b"\r\n"))
            reader.read(int(re.search(rb"content-length: (\d+)", head)[1]))
        server.process.send_signal(signal.SIGSTOP)
        new = [connections.enter_context(server.connect()) for _ in range(20)]
        for connection in (used, *new):
            connection.sendall(whole)
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGCONT)
        for connection in (used, *new):
            told = b"".join(iter(lambda connection=connection: connection.recv(65536), b""))
            assert told.startswith(b"HTTP/1.1 200")
        assert server.leaves() == 0


def test_a_connection_that_sends_nothing_does_not_hold_up_the_end(tmp_path):
    with serving(shared_bundle(SMALL), tmp_path / "log", drain_timeout_s=3600) as server, server.connect():
        with server.client() as client:
            assert client.get("/livez").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.leaves() == 0


def refuses_connections(server: Server) -> bool:
    try:
        server.connect().close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_process_whose_engine_fails_answers_everybody_and_says_that_it_is_dead(tmp_path):
    with (
        serving(shared_bundle(SMALL), tmp_path / "log", failing=True) as server,
        ThreadPoolExecutor(8) as pool,
        server.client() as client,
    ):
        assert client.get("/livez").status_code == 200
        answers = list(pool.map(lambda _: as_png("/classify", client), range(8)))
        failed = [answer for answer in answers if answer.status_code == 500]
        assert failed  # those in flight; who comes later may be told not_ready
        assert {answer.status_code for answer in answers} <= {500, 503}
        for answer in failed:
            assert answer.json()["error"] == "engine_failed"
            assert answer.json()["request_id"] == answer.headers["x-request-id"]
            assert "no more votes" not in answer.text
        for probe in ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/v2/models/random/ready"):
            assert client.get(probe).status_code == 503
        assert "no more votes" in server.log.read_text()
        server.process.send_signal(signal.SIGTERM)
        assert server.leaves() == 0


async def test_work_that_ends_with_the_service_is_counted(monkeypatch):
    monkeypatch.setattr(Sessions, "__init__", building(per_second=20_000))
    limits = {"max_samples": 100_000, "queue_rows": 10_000_000}
    service = build(Settings(bundle=shared_bundle(SMALL), device="cpu", threads=1, **limits))
    to_app = httpx.ASGITransport(service.app)
    async with (
        started(service.app),
        httpx.AsyncClient(transport=to_app, base_url="http://carso") as client,
    ):
        waiting = asyncio.create_task(client.post("/classify", json={"images": BATCH.tolist(), **ENDLESS}))
        while not sample((await client.get("/metrics")).text, 'carso_in_flight_requests{path="robust"}'):
            assert not waiting.done()
            await asyncio.sleep(PAUSE)
        service.abandon()
        assert (await waiting).status_code == 503
        assert sample((await client.get("/metrics")).text, 'carso_cancellations_total{reason="stopping"}') == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_loads_ends_it_at_once(tmp_path, number):
    """The manifest is a pipe that nobody writes to, so that it never has loaded it."""
    bundle = copy_of(shared_bundle(SMALL), tmp_path / "bundle")
    (bundle / "manifest.json").unlink()
    os.mkfifo(bundle / "manifest.json")
    with (tmp_path / "log").open("wb") as log:
        variables = environment(bundle=bundle, port=0, device="cpu")
        process = subprocess.Popen([sys.executable, *COMMAND], env=variables, stderr=log)
    try:
        eventually(lambda: catches(process.pid, signal.SIGTERM))  # the second one that it takes care of
        process.send_signal(number)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "log").read_text() == ""


async def test_an_engine_that_fails_in_a_round_fails_requests_and_liveness(monkeypatch):
    monkeypatch.setattr(Sessions, "__init__", building(failing=True))
    app = build(Settings(bundle=shared_bundle(SMALL), device="cpu", threads=1)).app
    to_app = httpx.ASGITransport(app)
    async with (
        started(app),
        httpx.AsyncClient(transport=to_app, base_url="http://carso") as client,
    ):
        assert (await client.get("/livez")).status_code == 200
        for refusal in ((500, "engine_failed"), (503, "not_ready")):  # while it fails, and after
            answer = await client.post("/classify", json={"images": VALUES.tolist()})
            assert (answer.status_code, answer.json()["error"]) == refusal
            assert answer.json()["request_id"] == answer.headers["x-request-id"]
            assert "no more votes" not in answer.text
        for probe in ("/livez", "/readyz"):
            assert (await client.get(probe)).status_code == 503
        assert "carso_ready 0.0" in (await client.get("/metrics")).text


@pytest.mark.parametrize(("name", "value"), [("queue_rows", 1000), ("fast_queue_rows", 1)])
def test_a_queue_that_could_never_take_the_largest_request_stops_the_start(name, value):
    with pytest.raises(SettingsError, match=f"CARSO_{name.upper()}: {value}"):
        build(Settings(bundle=shared_bundle(SMALL), device="cpu", **{name: value}))
