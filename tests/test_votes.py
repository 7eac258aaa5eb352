"""The votes as they come: /classify by server-sent events, and the same in the Python client."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing
from typing import Any

import httpx
import numpy as np
import pytest
from carso import (
    AsyncClient,
    CarsoError,
    Client,
    DeadlineExceeded,
    FirstPass,
    RequestRefused,
    RobustResult,
    Tally,
    Unavailable,
    UnexpectedAnswer,
)
from carso.api.answers import ErrorEvent, FirstPassEvent, RobustAnswer, TallyEvent
from carso.bundle import Bundle
from carso.client.events import Event
from carso.http.event_stream import Content, EventStream, Tell, wanted
from carso.http.exchange import Exchange
from carso.http.refusals import event
from carso.inference.engine import Engine
from carso.inference.jobs import FirstSeen, Job, News, Standing, VotePlan
from carso.inference.pipeline import Pipeline
from carso.inference.sessions import Sessions
from carso.inference.thread import InThread

from tests.bundles import SMALL, random_images, shared_bundle
from tests.calls import ENDLESS, FEW, PNG, VALUES, as_npy, in_flight, refused
from tests.pictures import npy
from tests.scripted import Reply, refusal, scripted
from tests.server import serving
from tests.waiting import comes_to, eventually

STREAM = "text/event-stream"
KINDS = {"first_pass": FirstPassEvent, "tally": TallyEvent, "answer": RobustAnswer, "error": ErrorEvent}


def events(client: httpx.Client, images: np.ndarray = VALUES, **options: Any) -> list[tuple[str, Any]]:
    """Name and content of each event of a whole answer."""
    headers = {"content-type": "application/x-npy", "accept": STREAM}
    answer = client.post("/classify", content=npy(images), headers=headers, params=options)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == STREAM
    assert answer.text.endswith("\n\n")
    found = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = (line.partition(": ")[2] for line in block.split("\n"))
        KINDS[name].model_validate_json(data)
        found.append((name, json.loads(data)))
    return found


def without_times(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in ("timings", "request_id")}


def test_the_tally_grows_round_by_round_until_the_answer_which_is_the_same_as_in_json(client):
    plain = as_npy("/classify", client, VALUES, seed=3, explain=True).json()
    *before, (last, answer) = events(client, seed=3, explain=True)
    assert last == "answer"
    assert without_times(answer) == without_times(plain)
    for image, prediction in enumerate(answer["predictions"]):
        (first,) = (content for name, content in before if name == "first_pass" and content["image"] == image)
        assert first["label"] == prediction["fast_label"]
        assert first["probabilities"] == prediction["explanation"]["first_pass"]["probabilities"]
        tallies = [content for name, content in before if name == "tally" and content["image"] == image]
        assert [each["votes"] for each in tallies] == sorted({each["votes"] for each in tallies})
        for each in tallies:
            assert sum(each["tally"]) == each["votes"]
            assert (each["needed"] == 0) == (each is tallies[-1])
        ended = tallies[-1]
        assert [ended[name] for name in ("tally", "votes", "risk_reached")] == [
            prediction[name] for name in ("tally", "votes", "risk_reached")
        ]


def test_a_long_count_shows_many_rounds(client):
    tallies = [content for name, content in events(client, VALUES[:1], risk=0, samples=50_000) if name == "tally"]
    assert len(tallies) > 3
    assert tallies[0]["needed"] > tallies[-1]["needed"] == 0


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("text/event-stream", True),
        ("Text/Event-Stream; charset=utf-8, application/json", True),
        ("application/json, text/event-stream", False),
        ("*/*", False),
        ("", False),
    ],
)
def test_events_are_sent_to_those_who_name_them_first(accept, expected):
    assert wanted(accept) == expected


def test_an_error_before_the_first_event_has_its_status(client, strict_client):
    headers = {"accept": STREAM, "content-type": "image/png"}
    refused(client.post("/classify", content=b"no image", headers=headers), 400, "undecodable_image")
    refused(client.post("/classify?samples=0", content=PNG, headers=headers), 422, "invalid_parameter")
    colour = {**headers, "content-type": "application/x-npy"}
    body = npy(np.random.default_rng(0).random((1, 3, 6, 5), np.float32))
    refused(strict_client.post("/classify?seed=1", content=body, headers=colour), 403, "seed_refused")


def test_the_fast_path_has_no_events(client):
    answer = client.post("/classify/fast", content=PNG, headers={"content-type": "image/png", "accept": STREAM})
    assert answer.headers["content-type"] == "application/json"


def test_an_error_after_the_first_event_is_the_last_event(tmp_path):
    with serving(shared_bundle(SMALL), tmp_path / "log", failing=True) as server, server.client() as client:
        *before, (last, error) = events(client)
        assert {name for name, _ in before} == {"first_pass"}
        assert (last, error["error"], error["status"]) == ("error", "engine_failed", 500)
        assert 'carso_rejections_total{reason="engine_failed"} 1.0' in eventually(
            lambda: page if "carso_rejections_total" in (page := server.metrics()) else ""
        )
    with serving(shared_bundle(SMALL), tmp_path / "log2", failing=True) as server, Client(server.url) as client:
        answered = client.votes(PNG)
        assert isinstance(next(answered), FirstPass)
        with pytest.raises(UnexpectedAnswer, match="engine_failed"):
            next(answered)


async def test_a_fault_of_the_service_after_the_first_event_is_told_by_its_name_and_only_the_log_has_the_rest(caplog):
    async def work(tell: Tell) -> Content:
        tell("tally", 0, {"votes": 1})
        await asyncio.sleep(0)
        tell("tally", 0, {"votes": 2})
        tell("tally", 0, {"votes": 3})
        await asyncio.sleep(0)
        raise ValueError("what nobody needs to know")

    sent = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    exchange = Exchange(request_id="seven")
    scope: dict[str, Any] = {}
    exchange.attach(scope)
    await EventStream(work, last="answer", failed=event)(scope, None, send)
    start, *bodies = sent
    assert (start["type"], start["status"]) == ("http.response.start", 200)
    text = b"".join(body["body"] for body in bodies).decode()
    assert [json.loads(line[6:]).get("votes") for line in text.splitlines() if line.startswith("data")] == [1, 3, None]
    assert '"error":"internal_error"' in text and '"status":500' in text
    assert "nobody needs" not in text and "nobody needs" in caplog.text
    assert exchange.error == "internal_error"


def test_where_evidence_is_withheld_no_votes_are_shown(tmp_path):
    with serving(shared_bundle(SMALL), tmp_path / "log", evidence="label") as server, server.client() as client:
        headers = {"content-type": "image/png", "accept": STREAM}
        message = refused(client.post("/classify", content=PNG, headers=headers), 403, "evidence_withheld")
        assert "leave out Accept" in message


def test_whoever_hangs_up_ends_the_count(endless_server):
    head = f"POST /classify?samples=100000&risk=0 HTTP/1.1\r\nhost: x\r\naccept: {STREAM}\r\n"
    body = npy(FEW)
    with endless_server.connect() as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        read_until(connection, b"event: tally")
        assert in_flight(endless_server) == 1
    comes_to(lambda: in_flight(endless_server), 0)
    assert 'carso_cancellations_total{reason="client_gone"}' in endless_server.metrics()


def read_until(connection: socket.socket, part: bytes) -> None:
    read = b""
    while part not in read:
        more = connection.recv(65536)
        assert more, read
        read += more


# the Python client


@pytest.fixture(params=["sync", "async"])
def votes(request) -> Callable[..., list[Event]]:
    """All events of a call of either client."""

    def sync(url: str, *args: Any, retries: int = 0, **options: Any) -> list[Event]:
        with Client(url, retries=retries) as client:
            return list(client.votes(*args, **options))

    async def asynchronous(url: str, *args: Any, retries: int = 0, **options: Any) -> list[Event]:
        async with AsyncClient(url, retries=retries) as client:
            return [event async for event in client.votes(*args, **options)]

    return sync if request.param == "sync" else lambda *args, **options: asyncio.run(asynchronous(*args, **options))


def test_the_client_gives_typed_events_and_last_the_result(server, votes):
    *before, result = votes(server.url, VALUES, seed=3, explain=True)
    assert isinstance(result, RobustResult)
    with Client(server.url) as client:
        assert result.predictions == client.classify(VALUES, seed=3, explain=True).predictions
    firsts = [event for event in before if isinstance(event, FirstPass)]
    assert [first.image for first in firsts] == [0, 1, 2]
    tallies = [event for event in before if isinstance(event, Tally)]
    assert len(firsts) + len(tallies) == len(before)
    for prediction, last in zip(result.predictions, {tally.image: tally for tally in tallies}.values(), strict=False):
        assert prediction.votes >= 1 and last.needed == 0


def test_a_refusal_is_raised_as_ever(server, votes):
    with pytest.raises(RequestRefused, match="undecodable_image"):
        votes(server.url, b"no image")


def test_an_overloaded_service_is_asked_again_and_one_that_has_no_events_is_named(votes):
    with scripted(refusal(429, "overloaded", retry_after=0), Reply(200, "event: x\ndata: {}\n\n")) as busy:
        with pytest.raises(UnexpectedAnswer, match="does not answer with events"):
            votes(busy.url, PNG, retries=1)
        assert len(busy.received) == 2
        assert all(each.headers["accept"] == STREAM for each in busy.received)


TALLY = 'event: tally\ndata: {"image": 0, "tally": [1, 0], "votes": 1, "risk_reached": 1.0, "needed": 9}\n\n'
ERROR = 'event: error\ndata: {"error": "%s", "message": "so it is", "request_id": "7", "status": %d}\n\n'
EVENTS = {"content-type": STREAM}


@pytest.mark.parametrize(
    ("text", "kind", "part"),
    [
        (TALLY, Unavailable, "ended its events without an answer"),
        (TALLY + ERROR % ("deadline_exceeded", 504), DeadlineExceeded, "so it is"),
        (TALLY + ERROR % ("untypical_image", 422), RequestRefused, "so it is"),
        (TALLY + ERROR % ("not_ready", 503), Unavailable, "so it is"),
        (TALLY + "event: error\ndata: nothing\n\n", UnexpectedAnswer, "an error that cannot be read"),
        (TALLY + "event: tally\ndata: {}\n\n", UnexpectedAnswer, "does not answer as a CARSO service does"),
    ],
)
def test_what_goes_wrong_after_the_first_event_is_raised_by_its_kind_and_nothing_is_sent_again(votes, text, kind, part):
    with scripted(Reply(200, text, EVENTS)) as service, pytest.raises(CarsoError, match=part) as raised:
        votes(service.url, PNG, retries=3)
    assert type(raised.value) is kind
    assert len(service.received) == 1


def test_events_of_a_newer_service_and_comments_are_passed_over(votes):
    newer = ": a comment\nid: 5\n\nevent: weather\ndata: {}\n\n"
    with scripted(Reply(200, newer + TALLY, EVENTS)) as service, Client(service.url) as client:
        assert next(client.votes(PNG)).votes == 1


def test_leaving_the_sync_iterator_hangs_up(endless_server):
    with Client(endless_server.url) as client:
        with closing(client.votes(FEW, **ENDLESS)) as answered:
            next(event for event in answered if isinstance(event, Tally))
            assert in_flight(endless_server) == 1
        comes_to(lambda: in_flight(endless_server), 0)


def test_leaving_the_async_iterator_hangs_up(endless_server):
    async def leave() -> None:
        async with AsyncClient(endless_server.url) as client, aclosing(client.votes(FEW, **ENDLESS)) as answered:
            async for event in answered:
                if isinstance(event, Tally):
                    break

    asyncio.run(leave())
    comes_to(lambda: in_flight(endless_server), 0)


def test_a_deadline_ends_the_events_with_the_votes_so_far(endless_server, votes):
    *before, result = votes(endless_server.url, FEW[:1], **ENDLESS, deadline=2)
    assert any(isinstance(event, Tally) for event in before)
    assert not result.predictions[0].complete


# the engine


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    sessions = Sessions(Bundle.load(shared_bundle()), device="cpu", threads=1)
    yield Pipeline(sessions, latent=SMALL.purifier.latent, classes=SMALL.classifier.classes, round_rows=64)


async def test_only_those_who_follow_a_job_are_told_of_it_and_before_it_is_done(pipeline):
    steps = []
    engine = Engine(InThread(pipeline, observe=steps.append))
    engine.start()
    job = Job(random_images(3), VotePlan(samples=1500, risk=0, seed=1))
    heard: list[News] = []
    followed, quiet = await asyncio.gather(engine.run(job, follow=heard.append), engine.run(job))
    await engine.stop()
    assert [outcome.tally for outcome in followed.outcomes] == [outcome.tally for outcome in quiet.outcomes]
    assert {ticket.followed for step in steps for ticket, _ in step.news} == {(FirstSeen, Standing)}
    firsts = [news for news in heard if isinstance(news, FirstSeen)]
    assert heard[:3] == firsts
    np.testing.assert_array_equal(np.stack([first.probabilities for first in firsts]), followed.probabilities)
    for image, outcome in enumerate(followed.outcomes):
        last = [news for news in heard if isinstance(news, Standing) and news.image == image][-1]
        assert last == Standing(image, outcome.tally, outcome.votes, outcome.risk_reached, 0)
