"""How the service ends: in good order when asked to, and plainly when its engine fails."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from carso.app import create_app
from carso.inference.pipeline import Pipeline
from carso.settings import Settings, SettingsError

from tests.bundles import SMALL, random_images, shared_bundle
from tests.calls import VALUES, as_npy, as_png, sample
from tests.server import environment, free_port, serving
from tests.signals import catches


def test_a_restart_under_load_loses_no_request(tmp_path):
    """As a balancer does it: requests go to the new server as soon as the old one is seen not to be ready."""
    bundle = shared_bundle(SMALL)
    with serving(bundle, tmp_path / "old", drain_delay_s=1.5) as old, serving(bundle, tmp_path / "new") as new:
        moved = threading.Event()
        over = threading.Event()

        def load(_):
            codes = []
            with old.client() as to_old, new.client() as to_new:
                while not over.is_set():
                    codes.append(as_png("/classify", to_new if moved.is_set() else to_old, risk=0).status_code)
            return codes

        with ThreadPoolExecutor(4) as pool:
            loads = [pool.submit(load, index) for index in range(4)]
            time.sleep(0.5)
            old.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            with old.client() as client:
                refused = client.get("/readyz")
                assert (refused.status_code, refused.json()["error"]) == (503, "not_ready")
                answered = as_png("/classify", client)
                assert (answered.status_code, answered.headers["connection"]) == (200, "close")
                assert client.get("/livez").status_code == 200
            moved.set()
            assert old.process.wait(30) == 0
            time.sleep(0.2)
            over.set()
        codes = [code for load in loads for code in load.result()]
    assert set(codes) == {200}
    assert len(codes) > 20
    assert "Traceback" not in (tmp_path / "old").read_text()


def test_what_does_not_finish_in_time_is_told_so(tmp_path):
    limits = {"max_samples": 100_000, "queue_rows": 10_000_000, "drain_timeout_s": 0.3}
    with serving(shared_bundle(SMALL), tmp_path / "log", **limits) as server, ThreadPoolExecutor(1) as pool:
        client = server.client()
        images = random_images(64)
        waiting = pool.submit(as_npy, "/classify", client, images, samples=100_000, risk=0)
        while 'carso_in_flight_requests{path="robust"} 1.0' not in httpx.get(f"{server.url}/metrics").text:
            time.sleep(0.01)
        with server.connect(timeout=30) as unfinished:  # a body that does not end
            unfinished.sendall(b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nx")
            time.sleep(0.1)
            server.process.send_signal(signal.SIGTERM)
            answer = waiting.result(30)
            assert (answer.status_code, answer.json()["error"]) == (503, "not_ready")
            assert answer.headers["retry-after"] == "1"
            told = b"".join(iter(lambda: unfinished.recv(65536), b""))
        assert told.startswith(b"HTTP/1.1 503")
        assert b'"error":"not_ready"' in told
        assert b"x-request-id" in told
        assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()
    assert server.log.read_text().count('"code":503') == 2


def test_what_is_in_flight_when_the_port_closes_is_answered_by_its_deadline(tmp_path):
    limits = {"max_samples": 100_000, "queue_rows": 10_000_000}
    with serving(shared_bundle(SMALL), tmp_path / "log", **limits) as server, ThreadPoolExecutor(2) as pool:
        endless = {"samples": 100_000, "risk": 0}
        late = pool.submit(as_npy, "/classify", server.client(), random_images(64), **endless, deadline_ms=1500)
        sound = pool.submit(as_npy, "/classify", server.client(), random_images(8), samples=3000, risk=0)
        while 'carso_in_flight_requests{path="robust"} 2.0' not in httpx.get(f"{server.url}/metrics").text:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(ConnectionRefusedError):
            server.connect(timeout=1)
        assert not late.done()
        assert sound.result(30).status_code == 200
        assert late.result(30).status_code == 200
        assert not all(prediction["complete"] for prediction in late.result().json()["predictions"])
        assert server.process.wait(30) == 0


FAILING = """
from carso.inference.pipeline import Pipeline
def fail(self):
    raise RuntimeError("no more votes")
Pipeline.round = fail
import sys
from carso.command import main
sys.argv[1:] = ["serve"]
main()
"""


def test_a_process_whose_engine_fails_answers_everybody_and_says_that_it_is_dead(tmp_path):
    with (
        serving(shared_bundle(SMALL), tmp_path / "log", program=("-c", FAILING)) as server,
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
        assert server.process.wait(30) == 0


async def test_work_that_ends_with_the_service_is_counted():
    app = create_app(Settings(bundle=shared_bundle(SMALL), device="cpu", threads=1))
    to_app = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=to_app, base_url="http://carso") as client,
    ):
        body = {"images": VALUES.tolist() * 20, "samples": 10_000, "risk": 0}
        waiting = asyncio.create_task(client.post("/classify", json=body))
        while not app.state.engine.in_flight:
            await asyncio.sleep(0.01)
        app.state.engine.abandon()
        assert (await waiting).status_code == 503
        assert sample((await client.get("/metrics")).text, 'carso_cancellations_total{reason="stopping"}') == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_loads_ends_it_at_once(tmp_path, number):
    with (tmp_path / "log").open("wb") as log:
        variables = environment(bundle=shared_bundle(SMALL), port=free_port(), device="cpu")
        process = subprocess.Popen([sys.executable, "-m", "carso.command", "serve"], env=variables, stderr=log)
    try:
        while not catches(process.pid, signal.SIGTERM):  # the second one that it takes care of
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(5) == 0
    finally:
        process.kill()
    assert (tmp_path / "log").read_text() == ""


async def test_an_engine_that_fails_in_a_round_fails_requests_and_liveness(monkeypatch):
    def fail(self):
        raise RuntimeError("no more votes")

    monkeypatch.setattr(Pipeline, "round", fail)
    app = create_app(Settings(bundle=shared_bundle(SMALL), device="cpu", threads=1))
    to_app = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
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
        create_app(Settings(bundle=shared_bundle(SMALL), device="cpu", **{name: value}))
