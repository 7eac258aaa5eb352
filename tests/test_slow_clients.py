"""Clients that never finish what they began to say."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack

import pytest

from tests.bundles import SMALL, shared_bundle
from tests.calls import PNG, as_png, logged, sample, started_body
from tests.server import Server, serving
from tests.waiting import comes_to

TIMEOUT = 1.0  # seconds


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    log = tmp_path_factory.mktemp("impatient") / "log"
    limits = {"receive_timeout_s": TIMEOUT, "max_samples": 100_000, "queue_rows": 10_000_000}
    with serving(shared_bundle(SMALL), log, per_second=20_000, **limits) as server:
        yield server


def connect(server: Server) -> socket.socket:
    connection = server.connect()
    connection.settimeout(0.1)  # between two pieces of a trickle
    return connection


def trickle(connection: socket.socket, start: bytes, drop: bytes) -> bytes:
    """Send `start`, then `drop` again and again until the server closes the connection; what it has answered."""
    answered = b""
    give_up = time.monotonic() + 60
    try:
        connection.sendall(start)
        while time.monotonic() < give_up:
            try:
                received = connection.recv(65536)
            except TimeoutError:
                connection.sendall(drop)
                continue
            if not received:
                return answered
            answered += received
    except (BrokenPipeError, ConnectionResetError):
        return answered
    raise AssertionError("the connection was left open")


@pytest.mark.parametrize("start", [b"", b"POST /", b"POST /classify HTTP/1.1\r\n", b"GET /livez HTTP/1.1\r\nx: "])
def test_a_head_that_does_not_end_closes_the_connection(impatient, start):
    with connect(impatient) as connection:
        assert trickle(connection, start, start and b"x") == b""


def test_a_body_that_does_not_end_is_answered_and_the_connection_closed(impatient):
    name = 'carso_rejections_total{reason="request_timeout"}'
    before = sample(impatient.metrics(), name)
    with connect(impatient) as connection:
        head = b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: 1000\r\n\r\n"
        answer = trickle(connection, head, b"x")
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"request_timeout" in answer
    comes_to(lambda: sample(impatient.metrics(), name), before + 1)


def test_a_body_that_nobody_waits_for_is_cut_off_too(impatient):
    with connect(impatient) as connection:
        answer = trickle(connection, b"POST /nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n", b"x")
        assert answer.startswith(b"HTTP/1.1 404")


CHUNKED = b"POST /classify HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n"


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /livez HTTP/1.1\r\nx: ", b"x"),
        (CHUNKED + b"0\r\nx: ", b"x"),
        (CHUNKED + b"0\r\n", b"a: b\r\n"),
        (CHUNKED + b"1;", b"x"),
    ],
    ids=["head", "trailer", "trailers", "chunk extension"],
)
def test_what_has_no_bounds_but_should_is_refused_at_once_in_the_one_shape(server, client, start, more):
    name = 'carso_requests_total{endpoint="other",status="431"}'
    before = sample(client.get("/metrics").text, name)
    with connect(server) as connection:
        answer = trickle(connection, start, more * (70_000 // len(more)))
    told(answer, 431, "head_too_large")  # and not request_timeout, which comes when the time is over
    comes_to(lambda: sample(client.get("/metrics").text, name), before + 1)
    assert sample(client.get("/metrics").text, 'carso_rejections_total{reason="head_too_large"}') >= 1


def test_a_long_body_in_tiny_chunks_is_no_trailer(client):
    chunks = (PNG[at : at + 1] for at in range(len(PNG)))
    padded = (b"x" for _ in range(30_000))  # 180 kB on the wire
    headers = {"content-type": "image/png"}
    assert client.post("/classify/fast", content=chunks, headers=headers).status_code == 200
    assert client.post("/classify/fast", content=padded, headers=headers).status_code == 400


def told(answer: bytes, status: int, error: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    content = json.loads(body)
    assert content["error"] == error
    assert content["message"]
    assert f"x-request-id: {content['request_id']}".encode() in head.lower()
    assert b"connection: close" in head.lower()
    assert b"cache-control: no-store" in head.lower()


def test_what_is_no_http_is_refused_in_the_one_shape_counted_and_logged(server, client):
    name = 'carso_rejections_total{reason="malformed_request"}'
    before = sample(client.get("/metrics").text, name)
    with connect(server) as connection:
        answer = trickle(connection, b"what is this?\r\n\r\n", b"x")
    told(answer, 400, "malformed_request")
    comes_to(lambda: sample(client.get("/metrics").text, name), before + 1)
    (line,) = logged(server, json.loads(answer.partition(b"\r\n\r\n")[2])["request_id"])
    assert line["status"] == 400


def test_an_empty_line_does_not_keep_an_idle_connection(impatient):
    with connect(impatient) as connection:  # an idle one stays open for longer than a trickle goes on
        answer = trickle(connection, b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n", b"\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


def test_others_are_answered_beside_a_hundred_of_them(impatient):
    def over() -> float:
        """Requests to /classify that got no answer from the classifier: the client hung up, or time was over."""
        page = impatient.metrics()
        return sum(sample(page, f'carso_requests_total{{endpoint="/classify",status="{s}"}}') for s in (408, 499))

    before = over()
    with ExitStack() as held:
        for _ in range(100):
            held.enter_context(started_body(impatient, "/classify", 1000))
        with impatient.client() as client:
            assert as_png("/classify/fast", client).status_code == 200
            assert as_png("/classify", client).status_code == 200
    comes_to(over, before + 100)


def test_a_connection_in_use_is_not_timed(impatient):
    """A count that takes longer than the body may take, and requests on one connection for longer than that."""
    with impatient.client() as client:
        longest = as_png("/classify", client, samples=50_000, risk=0)
        assert longest.status_code == 200
        assert longest.json()["timings"]["vote_ms"] > 1000 * TIMEOUT
        began = time.monotonic()
        while time.monotonic() - began < 1.5 * TIMEOUT:
            assert as_png("/classify", client).status_code == 200
            time.sleep(0.2)
