"""Clients that never finish what they began to say."""

from __future__ import annotations

import socket
import time

import pytest

from tests.bundles import SMALL, shared_bundle
from tests.calls import as_png, sample
from tests.server import Server, serving

TIMEOUT = 1.0  # seconds


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    log = tmp_path_factory.mktemp("impatient") / "log"
    with serving(shared_bundle(SMALL), log, receive_timeout_s=TIMEOUT) as server:
        yield server


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=0.1)


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


def test_a_head_without_bounds_is_refused_at_once(server):
    began = time.monotonic()
    with connect(server) as connection:
        trickle(connection, b"GET /livez HTTP/1.1\r\nx: ", b"x" * 70_000)
    assert time.monotonic() - began < 15  # where the time for a head is the default, 30


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
