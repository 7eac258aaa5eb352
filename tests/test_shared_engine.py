"""Several workers and one engine in a process of its own: real processes, and signals to each of them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from carso.bundle import Bundle
from carso.inference.engine import Engine
from carso.inference.jobs import Job, VotePlan
from carso.inference.pipeline import Pipeline
from carso.inference.remote import Asked, Left, Told
from carso.inference.sessions import Sessions
from carso.inference.thread import InThread
from carso.inference.wire import Unpacker, packed
from carso.workers.shared import SharedEngine

from tests.bundles import SMALL, copy_of, shared_bundle
from tests.calls import BATCH, ENDLESS, PNG, VALUES, as_npy, as_png, in_flight, refused, request, sample
from tests.pictures import npy
from tests.server import Server
from tests.test_settings import start
from tests.test_shutdown import refuses_connections
from tests.test_workers import LIMITS, alone, log_of, of_log, several, states, workers_of
from tests.waiting import PATIENCE, comes_to, eventually


@contextmanager
def sharing(log: Path, **settings: object) -> Iterator[tuple[Server, int, list[int]]]:
    """A server with one engine for two workers; with the ids of the engine's process and of theirs."""
    with several(log, engine="shared", **settings) as server:
        engine, *workers = workers_of(server)  # the oldest is the engine
        yield server, engine, workers


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, int, list[int]]]:
    """It computes what it is asked, as fast as it can."""
    with sharing(tmp_path_factory.mktemp("shared") / "log", **LIMITS) as running:
        yield running


def test_an_answer_to_a_seed_is_that_of_a_pipeline_whichever_worker_gives_it(shared):
    server, engine, workers = shared
    bundle = Bundle.load(shared_bundle(SMALL))
    sessions = Sessions(bundle, device="cpu", threads=1)
    pipeline = Pipeline(sessions, latent=SMALL.purifier.latent, classes=SMALL.classifier.classes, round_rows=128)
    expected = pipeline.classify(VALUES, VotePlan(samples=1500, risk=1e-3, seed=5))
    fast = sessions.first_pass(VALUES).probabilities
    for worker in workers:
        with alone(server, worker, engine), server.client() as client:
            found = as_npy("/classify", client, VALUES, seed=5).json()["predictions"]
            assert [each["tally"] for each in found] == [outcome.tally for outcome in expected]
            found = as_npy("/classify/fast", client, VALUES).json()["predictions"]
            np.testing.assert_allclose([each["probabilities"] for each in found], fast, atol=1e-5)


async def test_a_job_that_nobody_waits_for_any_more_when_it_comes_is_forgotten():
    """Both messages in one piece, so that its task is cancelled before it has begun."""
    sessions = Sessions(Bundle.load(shared_bundle(SMALL)), device="cpu", threads=1)
    pipeline = Pipeline(sessions, latent=SMALL.purifier.latent, classes=SMALL.classifier.classes, round_rows=128)
    engine = Engine(InThread(pipeline))
    engine.start()
    ours, theirs = socket.socketpair()
    with ours:
        ours.setblocking(False)
        shared = SharedEngine(engine, sessions.abilities)
        await shared.open(theirs)
        loop, unpacker, told = asyncio.get_running_loop(), Unpacker(), []
        for messages in ([[Asked(1, Job(VALUES), ())], [Left(1)]], [[Asked(2, Job(VALUES), ())]]):
            await loop.sock_sendall(ours, b"".join(bytes(part) for each in messages for part in packed(each)))
            await asyncio.sleep(0.01)
            shared.beat()
        async with asyncio.timeout(PATIENCE):
            while not any(isinstance(each, Told) and each.results for each in told):
                told += unpacker.feed(await loop.sock_recv(ours, 65536))
        shared.beat()  # which tells nothing where no job is left
        await asyncio.sleep(0.01)
        with pytest.raises(BlockingIOError):
            ours.recv(1)
    await engine.stop()
    assert told[0] == sessions.abilities
    assert [number for each in told[1:] for number, _ in each.results] == [2]


def test_events_and_explanations_come_through(shared):
    server, _, _ = shared
    with server.client() as client:
        events = client.post("/classify", content=PNG, headers={"accept": "text/event-stream"}).text
        assert [line for line in events.splitlines() if line.startswith("event: ")][0::2][0] == "event: first_pass"
        assert "event: tally" in events
        assert events.rstrip().splitlines()[-2] == "event: answer"
        (prediction,) = as_png("/classify", client, explain=True).json()["predictions"]
        assert len(prediction["explanation"]["votes"]) > 0


def test_the_queue_is_one_for_all_workers_and_a_client_that_hangs_up_frees_its_part(shared):
    server, engine, (one, other) = shared
    with ExitStack() as stack:
        with alone(server, one, engine):
            connection = stack.enter_context(server.connect())
            connection.sendall(request("/classify", npy(BATCH), content_type="application/x-npy", **ENDLESS))
            comes_to(lambda: in_flight(server), 1)
        with alone(server, other, engine), server.client() as client:
            refusal = as_npy("/classify", client, BATCH, **ENDLESS)
            assert "rows of work are owed to other requests" in refused(refusal, 429, "overloaded")
    comes_to(lambda: in_flight(server), 0)
    comes_to(lambda: sample(server.metrics(), 'carso_queue_rows{path="robust"}'), 0)


def test_metrics_show_what_the_engine_did_for_all_workers_and_its_pace(shared):
    server, engine, workers = shared
    before = sample(server.metrics(), "carso_first_pass_images_total")
    for worker in workers:
        with alone(server, worker, engine), server.client() as client:
            assert as_npy("/classify", client, VALUES, samples=1500, risk=0).status_code == 200
    page = server.metrics()
    assert sample(page, "carso_first_pass_images_total") == before + 2 * len(VALUES)
    assert sample(page, "carso_rounds_total") > 0
    with server.client() as client:  # it is known after a tenth of a second of work
        eventually(
            lambda: (
                as_npy("/classify", client, VALUES, samples=60_000, risk=0).status_code == 200
                and sample(server.metrics(), 'carso_rows_per_second{path="robust"}')
            )
        )
    assert states(server) == {"ready": 2.0}
    assert httpx.get(f"{server.url}/info").json()["workers"] == 2


def test_only_the_process_of_the_engine_loads_the_runtime(shared):
    server, engine, workers = shared
    loaded = {process: "onnxruntime" in Path(f"/proc/{process}/maps").read_text() for process in (engine, *workers)}
    assert loaded == {engine: True} | dict.fromkeys(workers, False)
    (ready,) = of_log(server, "the engine is ready")
    assert ready["provider"] == "CPUExecutionProvider"


def test_a_worker_that_is_killed_takes_its_own_work_along_and_no_other(tmp_path):
    with (
        sharing(tmp_path / "log", per_second=20_000, **LIMITS) as (server, engine, (one, other)),
        ThreadPoolExecutor(2) as pool,
        server.client() as first,
        server.client() as second,
    ):
        with alone(server, one, engine):
            lost = pool.submit(as_npy, "/classify", first, VALUES, **ENDLESS)
            comes_to(lambda: in_flight(server), 1)
        with alone(server, other, engine):
            kept = pool.submit(as_npy, "/classify", second, VALUES, samples=60_000, risk=0)
            comes_to(lambda: in_flight(server), 2)
        os.kill(one, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            lost.result(PATIENCE)
        assert kept.result(PATIENCE).status_code == 200
        comes_to(lambda: states(server), {"ready": 2.0})
        comes_to(lambda: sample(server.metrics(), 'carso_queue_rows{path="robust"}'), 0)
        assert engine in workers_of(server)
        rounds = sample(server.metrics(), "carso_rounds_total")
        with server.client() as client:  # the engine has dropped the lost work: this is its only round
            assert as_png("/classify/fast", client).status_code == 200
        assert sample(server.metrics(), "carso_rounds_total") == rounds


def test_an_engine_that_is_killed_fails_what_is_in_flight_and_all_is_replaced(tmp_path):
    with (
        sharing(tmp_path / "log", per_second=20_000, **LIMITS) as (server, engine, workers),
        ThreadPoolExecutor(2) as pool,
        server.client() as first,
        server.client() as second,
    ):
        waiting = []
        for worker, client in zip(workers, (first, second), strict=True):
            with alone(server, worker, engine):
                waiting.append(pool.submit(as_npy, "/classify", client, VALUES, **ENDLESS))
                comes_to(lambda: in_flight(server), len(waiting))
        os.kill(engine, signal.SIGKILL)
        for answer in waiting:
            refused(answer.result(PATIENCE), 500, "engine_failed")
        eventually(lambda: not {engine, *workers} & {*workers_of(server)})
        with server.client() as client:  # it waits in the shared socket until a worker is there
            assert as_png("/classify/fast", client).status_code == 200
        comes_to(lambda: states(server), {"ready": 2.0})
        server.process.send_signal(signal.SIGTERM)
        assert server.leaves() == 0
    assert "Traceback" not in server.log.read_text()


def test_an_engine_whose_thread_fails_is_replaced_too(tmp_path):
    with sharing(tmp_path / "log", failing=True) as (server, engine, _), server.client() as client:
        refused(as_png("/classify", client), 500, "engine_failed")
        eventually(lambda: engine not in workers_of(server))
        comes_to(lambda: states(server), {"ready": 2.0})


def test_a_signal_lets_requests_finish_and_the_engine_ends_last(tmp_path):
    with (
        sharing(tmp_path / "log", per_second=20_000, **LIMITS) as (server, engine, (one, _)),
        ThreadPoolExecutor(1) as pool,
        server.client() as client,
    ):
        with alone(server, one, engine):
            waiting = pool.submit(as_npy, "/classify", client, VALUES, samples=60_000, risk=0)
            comes_to(lambda: in_flight(server), 1)
        server.process.send_signal(signal.SIGTERM)
        assert waiting.result(PATIENCE).status_code == 200
        assert server.leaves() == 0
    assert "Traceback" not in server.log.read_text()


def test_no_process_outlives_the_supervisor(tmp_path):
    with sharing(tmp_path / "log") as (server, engine, workers):
        server.process.kill()
        server.process.wait()
        eventually(lambda: refuses_connections(server))
        eventually(lambda: not any(Path(f"/proc/{each}/cmdline").exists() for each in (engine, *workers)))


@pytest.mark.slow
def test_an_engine_that_stands_still_is_killed_and_replaced(tmp_path):
    with sharing(tmp_path / "log", watchdog_s=5) as (server, engine, _):
        os.kill(engine, signal.SIGSTOP)
        eventually(lambda: engine not in workers_of(server))
        comes_to(lambda: states(server), {"ready": 2.0})
        assert any("the event loop of the engine has stood still" in str(line["message"]) for line in log_of(server))


def test_a_single_worker_can_have_an_engine_in_another_process_whose_thread_captured_its_graphs(tmp_path):
    """SIGHUP reads keys, and leaves the engine alone."""
    graphs = {"cuda": True, "device": "cuda", "cuda_graphs": True}
    with several(tmp_path / "log", workers=1, engine="shared", **graphs) as server, server.client() as client:
        assert len(workers_of(server)) == 2
        assert as_npy("/classify", client, VALUES, samples=1000, risk=0).status_code == 200
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: "SIGHUP reads the API keys again" in server.log.read_text())
        assert as_npy("/classify", client, VALUES, samples=1000, risk=0).status_code == 200
        assert "no CUDA graphs are used" not in server.log.read_text()


def test_what_the_engine_cannot_start_with_is_said_once_with_its_exit_status(tmp_path):
    damaged = copy_of(shared_bundle(SMALL), tmp_path / "damaged")
    (damaged / "vote.onnx").write_bytes(b"no graph")
    ended = start(bundle=damaged, device="cpu", workers=2, engine="shared", port=0)
    assert (ended.returncode, ended.stderr.count("carso: ")) == (1, 1)
    assert "vote.onnx" in ended.stderr


def test_what_only_a_worker_can_find_out_ends_the_start_too():
    ended = start(bundle=shared_bundle(SMALL), device="cpu", workers=2, engine="shared", port=0, max_samples=10)
    assert (ended.returncode, ended.stderr.count("carso: ")) == (2, 1)
    assert "CARSO_MAX_SAMPLES: 10 is not allowed with bundle" in ended.stderr
