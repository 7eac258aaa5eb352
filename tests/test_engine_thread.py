"""The engine's thread: it builds, warms up and tests the sessions, and no other thread ever runs them."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from carso.app import build
from carso.bundle import Bundle
from carso.inference import sessions
from carso.inference.loading import pipeline_of
from carso.inference.one_thread import OneThread
from carso.settings import Settings

from tests.bundles import SMALL, shared_bundle
from tests.calls import VALUES
from tests.cuda import NO_GRAPH, CudaOnTheCpu, pretend
from tests.lifespan import started
from tests.waiting import PATIENCE

GRAPHS = {"device": "cuda", "cuda_graphs": True}
ROBUST = {"images": VALUES.tolist(), "samples": 500, "risk": 0}
REASON = "operation not permitted when stream is capturing"


@pytest.fixture
def cuda(monkeypatch) -> type[CudaOnTheCpu]:
    pretend(monkeypatch.setattr)
    monkeypatch.setattr(sessions, "CUDA_BUCKETS", (4, 32, 512))
    return CudaOnTheCpu


@asynccontextmanager
async def in_process(**settings: object) -> AsyncIterator[httpx.AsyncClient]:
    app = build(Settings(bundle=shared_bundle(SMALL), threads=1, canary_s=0, **settings)).app
    async with (
        started(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://carso", timeout=PATIENCE) as client,
    ):
        yield client


async def test_every_graph_is_captured_at_the_start_in_the_thread_that_later_casts_the_votes(cuda):
    async with in_process(**GRAPHS) as client:
        at_the_start = {run.graph for run in cuda.runs}
        del cuda.runs[:]
        for path, asked in (("/classify", ROBUST), ("/classify/fast", {"images": VALUES.tolist()})):
            answer = await client.post(path, json=asked)
            assert answer.status_code == 200, answer.text
        answer = await client.post("/classify", json=ROBUST | {"images": VALUES[:1].tolist(), "explain": True})
        assert answer.status_code == 200, answer.text
    assert {run.thread for run in cuda.runs} == {"carso-engine"}
    replayed = [run.graph for run in cuda.runs if run.graph not in NO_GRAPH]
    assert len(set(replayed)) > 3
    assert set(replayed) <= at_the_start
    assert len(replayed) == len(cuda.runs)  # and no run went before a capture


@pytest.mark.parametrize("broken", ["start", "capture"])
async def test_a_service_whose_graphs_cannot_be_captured_starts_without_and_says_why(cuda, caplog, broken):
    cuda.broken = broken
    async with in_process(**GRAPHS) as client:
        assert cuda.built[-1]["enable_cuda_graph"] == "0"
        assert (await client.get("/readyz")).status_code == 200
        answer = await client.post("/classify", json=ROBUST)
        assert answer.status_code == 200, answer.text
        assert (await client.get("/info")).json()["device"]["provider"] == "CUDAExecutionProvider"
    told = [each for each in caplog.messages if each.startswith("no CUDA graphs are used: ")]
    assert len(told) == 1
    assert ("not all nodes are on CUDA" if broken == "start" else REASON) in told[0]


def test_a_pipeline_that_is_thrown_away_unused_ends_its_thread():
    before = set(threading.enumerate())
    pipeline, thread = pipeline_of(Bundle.load(shared_bundle(SMALL)), Settings(device="cpu", threads=1))
    (own,) = set(threading.enumerate()) - before
    del pipeline, thread
    own.join(PATIENCE)
    assert not own.is_alive()


def test_what_a_function_raises_in_the_thread_is_raised_where_it_is_waited_for_and_the_thread_goes_on():
    thread = OneThread()
    with pytest.raises(ZeroDivisionError):
        thread.submit(lambda: 1 // 0).result(PATIENCE)
    assert thread.submit(lambda: threading.current_thread().name).result(PATIENCE) == "carso-engine"
    assert thread.end(PATIENCE)
