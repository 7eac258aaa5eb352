"""Clients that never finish what they began to say."""

from __future__ import annotations

import json
import socket
import time

import pytest

from tests.bundles import SMALL, shared_bundle
from tests.calls import PNG, as_png, sample
from tests.server import Server, serving

TIMEOUT = 1.0  # seconds


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    log = tmp_path_factory.mktemp("impatient") / "log"
    with serving(shared_bundle(SMALL), log, receive_timeout_s=TIMEOUT) as server:
        yield server


def connect(server: Server) -> socket.socket:
    return server.connect(timeout=0.1)


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
    with connect(impatient) as connection:
        head = b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: 1000\r\n\r\n"
        answer = trickle(connection, head, b"x")
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"request_timeout" in answer
    with impatient.client() as client:
        assert sample(client.get("/metrics").text, 'carso_rejections_total{reason="request_timeout"}') == 1


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
    name = 'carso_requests_total{code="431",endpoint="other"}'
    before = sample(client.get("/metrics").text, name)
    began = time.monotonic()
    with connect(server) as connection:
        answer = trickle(connection, start, more * (70_000 // len(more)))
    assert time.monotonic() - began < 15  # where the time for a head is the default, 30
    told(answer, 431, "head_too_large")
    after = client.get("/metrics").text
    assert sample(after, name) == before + 1
    assert sample(after, 'carso_rejections_total{reason="head_too_large"}') >= 1


def test_a_long_body_in_tiny_chunks_is_no_trailer(client):
    chunks = (PNG[at : at + 1] for at in range(len(PNG)))
    padded = (b"x" for _ in range(30_000))  # 180 kB on the wire
    headers = {"content-type": "image/png"}
    assert client.post("/classify/fast", content=chunks, headers=headers).status_code == 200
    assert client.post("/classify/fast", content=padded, headers=headers).status_code == 400


def told(answer: bytes, code: int, error: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % code), answer
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
    assert sample(client.get("/metrics").text, name) == before + 1
    request_id = json.loads(answer.partition(b"\r\n\r\n")[2])["request_id"]
    assert any(request_id in line and '"code":400' in line for line in server.log.read_text().splitlines())


def test_an_empty_line_does_not_keep_an_idle_connection(impatient):
    began = time.monotonic()
    with connect(impatient) as connection:
        answer = trickle(connection, b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n", b"\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert time.monotonic() - began < 15


def test_others_are_answered_beside_a_hundred_of_them(impatient):
    held = [connect(impatient) for _ in range(100)]
    for connection in held:
        connection.sendall(b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nx")
    with impatient.client() as client:
        assert as_png("/classify/fast", client).status_code == 200
        assert as_png("/classify", client).status_code == 200
    for connection in held:
        connection.close()


def test_a_connection_in_use_is_not_timed(impatient):
    """A count that takes longer than the body may take, and requests on one connection for longer than that."""
    with impatient.client() as client:
        began = time.monotonic()
        while time.monotonic() - began < 2.5 * TIMEOUT:
            assert as_png("/classify", client, samples=10_000, risk=0).status_code == 200
            time.sleep(0.2)
