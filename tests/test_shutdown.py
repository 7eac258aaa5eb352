"""How the service ends: in good order when asked to, and plainly when its engine fails."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from service.app import create_app
from service.pipeline import Pipeline
from service.settings import Settings, SettingsError
from tests.bundles import SMALL, random_images, shared_bundle
from tests.calls import VALUES, as_npy, as_png
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
        server.process.send_signal(signal.SIGTERM)
        answer = waiting.result(30)
        assert (answer.status_code, answer.json()["error"]) == (503, "not_ready")
        assert answer.headers["retry-after"] == "1"
        assert server.process.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_loads_ends_it_at_once(tmp_path, number):
    with (tmp_path / "log").open("wb") as log:
        variables = environment(bundle=shared_bundle(SMALL), port=free_port(), device="cpu")
        process = subprocess.Popen([sys.executable, "-m", "service"], env=variables, stderr=log)
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
