"""Several workers behind one port: real processes, and signals to each of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.bundles import SMALL, copy_of, shared_bundle
from tests.calls import BATCH, ENDLESS, PNG, VALUES, as_npy, as_png, in_flight, refused, request, sample
from tests.duplex import PATH, streaming
from tests.pictures import npy
from tests.server import ROOT, Server, serving
from tests.test_keys import NEW, OLD
from tests.test_settings import start
from tests.test_shutdown import refuses_connections
from tests.waiting import PATIENCE, comes_to, eventually

LIMITS = {"max_samples": 100_000, "queue_rows": 64 * 100_001}  # ENDLESS for BATCH, and nothing beside it


@contextmanager
def several(log: Path, *, workers: int = 2, **settings: object) -> Iterator[Server]:
    """A server all of whose workers are ready, and may stand still for as long as a test likes."""
    settings = {"watchdog_s": 3600, **settings}
    with serving(shared_bundle(SMALL), log, workers=workers, **settings) as server:
        comes_to(lambda: len(of_log(server, "ready")), 1)
        yield server


def of_log(server: Server, message: str) -> list[dict[str, object]]:
    """The whole lines of the log with a message."""
    lines = server.log.read_text().rpartition("\n")[0].splitlines()
    return [line for line in map(json.loads, lines) if line["message"] == message]


def workers_of(server: Server) -> list[int]:
    """The ids of the workers that are there, the oldest first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == server.process.pid and fields[0] != "Z":
            found.append((int(fields[19]), int(stat.parent.name)))
    return [process for _, process in sorted(found)]


@contextmanager
def alone(server: Server, worker: int, *besides: int) -> Iterator[None]:
    """The other workers stand still, so that this one answers all that begins meanwhile. `besides`: who goes on too."""
    others = [process for process in workers_of(server) if process not in (worker, *besides)]
    with ExitStack() as stack:
        for other in others:
            os.kill(other, signal.SIGSTOP)
            stack.callback(os.kill, other, signal.SIGCONT)
            comes_to(lambda other=other: Path(f"/proc/{other}/stat").read_text().rpartition(")")[2].split()[0], "T")
        yield


def states(server: Server) -> dict[str, float]:
    page = server.metrics()
    names = ("dead", "loading", "ready", "draining", "failed")
    return {name: count for name in names if (count := sample(page, f'carso_workers{{state="{name}"}}'))}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two workers that cast 20 000 votes a second, so that ENDLESS is under way for minutes."""
    with several(tmp_path_factory.mktemp("two") / "log", per_second=20_000, max_streams=2, **LIMITS) as server:
        yield server


def test_workers_are_processes_of_one_command_and_the_log_says_once_that_all_are_ready(two):
    (ready,) = of_log(two, "ready")
    assert (ready["workers"], ready["provider"]) == (2, "CPUExecutionProvider")
    assert httpx.get(f"{two.url}/info").json()["workers"] == 2
    assert "worker" not in ready
    (listening,) = of_log(two, "listening")
    assert listening["addresses"] == [two.url]
    assert {line["worker"] for line in of_log(two, "Application startup complete.")} == {1, 2}
    command = Path(f"/proc/{two.process.pid}/cmdline").read_bytes()
    for worker in workers_of(two):
        assert Path(f"/proc/{worker}/cmdline").read_bytes() == command


def test_metrics_and_statistics_of_each_worker_are_the_sum(two):
    names = (
        'carso_requests_total{endpoint="/classify/fast",status="200"}',
        "carso_first_pass_images_total",
        'carso_stage_duration_seconds_count{path="fast",stage="decode"}',
    )

    def counted() -> list[float]:
        page = two.metrics()
        return [sample(page, name) for name in names]

    before = counted()
    for worker, requests in zip(workers_of(two), (3, 2), strict=True):
        with alone(two, worker):
            for _ in range(requests):
                assert httpx.post(f"{two.url}/v2/models/random-fast/infer", json=TENSOR).status_code == 200
                assert httpx.post(f"{two.url}/classify/fast", content=PNG).status_code == 200
    for worker in workers_of(two):
        with alone(two, worker):
            comes_to(counted, [before[0] + 5, before[1] + 10, before[2] + 10])
            (entry,) = httpx.get(f"{two.url}/v2/models/random-fast/stats").json()["model_stats"]
            assert (entry["inference_count"], entry["inference_stats"]["success"]["count"]) == (5, 5)
            assert sample(two.metrics(), 'carso_workers{state="ready"}') == 2


TENSOR = {"inputs": [{"name": "images", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": VALUES[0].ravel().tolist()}]}


def test_the_queue_is_one_for_all_workers(two):
    one, other = workers_of(two)
    with ExitStack() as stack:
        with alone(two, one):
            connection = stack.enter_context(two.connect())
            connection.sendall(request("/classify", npy(BATCH), content_type="application/x-npy", **ENDLESS))
            comes_to(lambda: in_flight(two), 1)
        with alone(two, other), two.client() as client:
            refusal = as_npy("/classify", client, BATCH, **ENDLESS)
            assert "rows of work are owed to other requests" in refused(refusal, 429, "overloaded")
            assert int(refusal.headers["retry-after"]) >= 1  # by the other worker's pace, and so by the machine
            assert in_flight(two) == 1
    comes_to(lambda: in_flight(two), 0)
    comes_to(lambda: sample(two.metrics(), 'carso_queue_rows{path="robust"}'), 0)


def test_as_many_streams_are_open_as_all_workers_may_have_together(two):
    one, other = workers_of(two)
    with ExitStack() as stack:
        for worker in (one, other):
            with alone(two, worker):
                stack.enter_context(streaming(two))
        with two.client() as client:
            assert "2 streams are open, and at most 2" in refused(client.post(PATH), 429, "overloaded")
        assert sample(two.metrics(), "carso_streams") == 2
    comes_to(lambda: sample(two.metrics(), "carso_streams"), 0)


def test_a_worker_that_is_killed_is_replaced_and_its_requests_alone_fail(two):
    one, other = workers_of(two)
    requests = 'carso_requests_total{endpoint="/classify/fast",status="200"}'
    before = sample(two.metrics(), requests), sample(two.metrics(), "carso_worker_restarts_total")
    with ThreadPoolExecutor(2) as pool, two.client() as first, two.client() as second:
        with alone(two, one):
            lost = pool.submit(as_npy, "/classify", first, VALUES, **ENDLESS)
            comes_to(lambda: in_flight(two), 1)
        with alone(two, other):
            kept = pool.submit(as_npy, "/classify", second, VALUES, samples=60_000, risk=0)
            comes_to(lambda: in_flight(two), 2)
        os.kill(one, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            lost.result(PATIENCE)
        assert httpx.get(f"{two.url}/readyz", timeout=PATIENCE).status_code == 200
        comes_to(lambda: states(two), {"ready": 2.0})
        comes_to(lambda: in_flight(two), 1 if not kept.done() else 0)
        assert kept.result(PATIENCE).status_code == 200
    (replaced,) = {*workers_of(two)} - {other}
    assert replaced != one
    page = two.metrics()
    assert (sample(page, requests), sample(page, "carso_worker_restarts_total")) == (before[0], before[1] + 1)
    comes_to(lambda: sample(two.metrics(), 'carso_queue_rows{path="robust"}'), 0)
    with alone(two, replaced):
        assert httpx.post(f"{two.url}/classify/fast", content=PNG, timeout=PATIENCE).status_code == 200
        comes_to(lambda: sample(two.metrics(), requests), before[0] + 1)
    assert any("was ended by SIGKILL: another takes its place" in str(line) for line in log_of(two))
    comes_to(lambda: len(of_log(two, "worker 1 is ready again")) + len(of_log(two, "worker 2 is ready again")), 1)


def log_of(server: Server) -> list[dict[str, object]]:
    return [json.loads(line) for line in server.log.read_text().rpartition("\n")[0].splitlines()]


def test_a_rate_holds_for_all_workers_and_a_signal_gives_all_of_them_other_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"slow: {OLD} rate=1\n")
    with several(tmp_path / "log", api_keys_file=file) as server:
        one, other = workers_of(server)
        with alone(server, one), server.client() as client:
            client.headers["authorization"] = f"Bearer {OLD}"
            assert as_npy("/classify", client, VALUES, samples=1500, risk=0).status_code == 200
        for worker in (other, one):
            with alone(server, worker), server.client() as client:
                client.headers["authorization"] = f"Bearer {OLD}"
                assert "the key of slow" in refused(as_png("/classify", client), 429, "overloaded")
        file.write_text(f"another: {NEW}\n")
        server.process.send_signal(signal.SIGHUP)
        comes_to(lambda: len(of_log(server, "the API keys were read again")), 2)
        os.kill(one, signal.SIGKILL)
        comes_to(lambda: states(server), {"ready": 2.0})
        for worker in workers_of(server):
            with alone(server, worker), server.client() as client:
                client.headers["authorization"] = f"Bearer {NEW}"
                assert as_png("/classify", client).status_code == 200
                client.headers["authorization"] = f"Bearer {OLD}"
                refused(as_png("/classify", client), 401, "unauthorized")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_makes_all_workers_unready_and_lets_them_finish(tmp_path, number):
    """The delay is far longer than that takes; a second signal ends it."""
    with (
        several(tmp_path / "log", per_second=20_000, drain_delay_s=3600, **LIMITS) as server,
        ThreadPoolExecutor(2) as pool,
        server.client() as first,
        server.client() as second,
    ):
        waiting = []
        for worker, client in zip(workers_of(server), (first, second), strict=True):
            with alone(server, worker):
                waiting.append(pool.submit(as_npy, "/classify", client, VALUES, samples=60_000, risk=0))
                comes_to(lambda: in_flight(server), len(waiting))
        server.process.send_signal(number)
        for worker in workers_of(server):
            with alone(server, worker), server.client() as client:
                eventually(lambda client=client: client.get("/readyz").status_code == 503)
                answer = eventually(
                    lambda client=client: (a := as_png("/classify", client)).headers.get("connection") and a
                )
                assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        server.process.send_signal(number)
        eventually(lambda: refuses_connections(server))
        for answered in waiting:
            assert answered.result(PATIENCE).status_code == 200
        assert server.leaves() == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_a_worker_that_gets_the_signal_alone_finishes_and_is_replaced(tmp_path):
    with several(tmp_path / "log", per_second=20_000, **LIMITS) as server, server.client() as client:
        one, other = workers_of(server)
        with ThreadPoolExecutor(1) as pool:
            with alone(server, one):
                waiting = pool.submit(as_npy, "/classify", client, VALUES, samples=60_000, risk=0)
                comes_to(lambda: in_flight(server), 1)
            os.kill(one, signal.SIGTERM)
            assert waiting.result(PATIENCE).status_code == 200
        eventually(lambda: one not in workers_of(server))
        comes_to(lambda: states(server), {"ready": 2.0})
        assert other in workers_of(server)


def test_a_worker_whose_engine_fails_answers_and_is_replaced(tmp_path):
    with several(tmp_path / "log", failing=True) as server:
        one, other = workers_of(server)
        with alone(server, one), server.client() as client:
            refused(as_png("/classify", client), 500, "engine_failed")
        eventually(lambda: one not in workers_of(server))
        comes_to(lambda: states(server), {"ready": 2.0})
        assert other in workers_of(server)
        assert httpx.get(f"{server.url}/livez", timeout=PATIENCE).status_code == 200
        assert any("it ends, and another takes its place" in str(line) for line in log_of(server))


@pytest.mark.slow
def test_a_worker_whose_event_loop_stands_still_is_killed_and_replaced(tmp_path):
    with several(tmp_path / "log", watchdog_s=5) as server:
        one, other = workers_of(server)
        os.kill(one, signal.SIGSTOP)
        eventually(lambda: one not in workers_of(server))
        comes_to(lambda: states(server), {"ready": 2.0})
        assert other in workers_of(server)
        assert any("has stood still for" in str(line) for line in log_of(server))


def test_the_supervisor_is_light_and_workers_do_not_outlive_it(tmp_path):
    with several(tmp_path / "log") as server:
        workers = workers_of(server)
        of_worker, of_supervisor = (
            Path(f"/proc/{process}/maps").read_text() for process in (workers[0], server.process.pid)
        )
        for library in ("onnxruntime", "numpy", "uvloop"):
            assert library in of_worker
            assert library not in of_supervisor
        server.process.kill()
        server.process.wait()
        eventually(lambda: refuses_connections(server))
        eventually(lambda: not any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers))
    assert "the supervisor has ended, and so does this worker" in server.log.read_text()


def test_one_worker_is_a_process_without_a_supervisor(server):
    assert workers_of(server) == []
    assert "carso_workers" not in server.metrics()
    (ready,) = of_log(server, "ready")
    assert not {"worker", "workers"} & set(ready)


def test_what_no_worker_can_start_with_is_said_once_with_its_exit_status(tmp_path):
    damaged = copy_of(shared_bundle(SMALL), tmp_path / "damaged")
    (damaged / "vote.onnx").write_bytes(b"no graph")
    ended = start(bundle=damaged, device="cpu", workers=2, port=0)
    assert (ended.returncode, ended.stderr.count("carso: ")) == (1, 1)
    assert "vote.onnx" in ended.stderr
    ended = start(bundle=shared_bundle(SMALL), device="cpu", workers=2, port=0, max_samples=10)
    assert (ended.returncode, ended.stderr.count("carso: ")) == (2, 1)
    assert "CARSO_MAX_SAMPLES: 10 is not allowed with bundle" in ended.stderr


def test_a_port_that_is_taken_ends_the_start_before_any_worker_loads(two):
    ended = start(bundle=shared_bundle(SMALL), device="cpu", workers=2, port=httpx.URL(two.url).port)
    assert ended.returncode == 1
    assert ended.stderr.startswith("carso: cannot listen at 127.0.0.1:")
    assert "self-test" not in ended.stderr


@pytest.mark.slow
def test_a_replacement_that_cannot_start_again_and_again_ends_the_service_with_its_reason(tmp_path):
    bundle = copy_of(shared_bundle(SMALL), tmp_path / "bundle")
    with serving(bundle, tmp_path / "log", workers=2) as server:
        comes_to(lambda: len(of_log(server, "ready")), 1)
        (bundle / "vote.onnx").write_bytes(b"no graph")
        os.kill(workers_of(server)[0], signal.SIGKILL)
        assert server.leaves() == 1
        told = server.log.read_text()
    assert told.count("It is tried again in") == 2
    (last,) = [line for line in told.splitlines() if line.startswith("carso: ")]
    assert "vote.onnx" in last


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"workers": 0}, "CARSO_WORKERS: '0' is not allowed; it must be an integer from 1 to 64 or auto"),
        ({"workers": "many"}, "CARSO_WORKERS: 'many' is not allowed"),
        (
            {"workers": 2, "device": "cuda", "engine": "own"},
            "CARSO_ENGINE: own is not allowed with CARSO_DEVICE cuda and CARSO_WORKERS 2",
        ),
        ({"engine": "shared", "grpc_port": 9}, "CARSO_GRPC_PORT: 9 is not allowed with several processes"),
    ],
)
def test_a_number_of_workers_that_cannot_be_is_refused(given, told):
    ended = start(**{"bundle": shared_bundle(SMALL), "device": "cpu", **given})
    assert (ended.returncode, ended.stderr.count("CARSO_WORKERS")) == (2, 1)
    assert told in ended.stderr


def test_lines_of_several_processes_are_never_torn():
    """However long they are, and although a pipe holds less than one."""
    program = """
import logging, sys
from carso.board.memory import Memory
from carso.board.seat import Board
from carso.telemetry import logs
board, number = Board(Memory(int(sys.argv[1]))), int(sys.argv[2])
logs.configure("info", "json", logs.Lines(board.log_lock, number))
for _ in range(20):
    logging.getLogger("a").info("x" * 200_000)
"""
    from carso.board.seat import Board

    board = Board.create(workers=3, supervisor=1)
    read, write = os.pipe()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(board.memory.descriptor), str(number)],
            pass_fds=[board.memory.descriptor],
            stderr=write,
            cwd=ROOT,
        )
        for number in (1, 2, 3)
    ]
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as told:
        lines = [json.loads(line) for line in told]
    assert [process.wait(PATIENCE) for process in processes] == [0, 0, 0]
    assert sorted(line["worker"] for line in lines) == [1] * 20 + [2] * 20 + [3] * 20
    assert {len(line["message"]) for line in lines} == {200_000}
