"""Requests as the tests send them, and what they assert of every refusal. The images fit the server of conftest.py."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import httpx
import numpy as np
from carso.api.answers import ErrorAnswer

from tests.pictures import encoded, npy
from tests.server import Server
from tests.waiting import comes_to, eventually

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)  # three images
VALUES = (PIXELS / np.float32(255)).astype(np.float32)[:, None]  # [3, 1, 8, 8]
BATCH = np.repeat(VALUES, 21, axis=0)  # 63 images, one less than a request may have
FEW = BATCH[:8]
# On the endless server: minutes for BATCH, 20 seconds at least for FEW, whose images all have votes after a quarter
ENDLESS = {"samples": 100_000, "risk": 0}
PNG = encoded(PIXELS[0])
COLOUR_PNG = encoded(np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8))
PATHS = ("/classify", "/classify/fast")


def as_png(path: str, client: httpx.Client, **options: object) -> httpx.Response:
    return client.post(path, content=PNG, headers={"content-type": "image/png"}, params=options)


def as_npy(path: str, client: httpx.Client, array: np.ndarray, **options: object) -> httpx.Response:
    return client.post(path, content=npy(array), headers={"content-type": "application/x-npy"}, params=options)


def refused(response: httpx.Response, status: int, error: str) -> str:
    """Asserts the one shape of errors; returns the message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    answer = ErrorAnswer.model_validate_json(response.content)
    assert answer.error == error
    assert answer.request_id == response.headers["x-request-id"]
    return answer.message


def sample(page: str, name: str) -> float:
    """The value of one series; 0 if it is not there yet."""
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(f"{name} "))


def in_flight(server: Server) -> float:
    """Requests that the engine has."""
    page = server.metrics()
    return sum(sample(page, f'carso_in_flight_requests{{path="{path}"}}') for path in ("fast", "robust"))


def request(path: str, body: bytes, *, content_type: str, **options: object) -> bytes:
    """A whole request as it goes over the wire."""
    head = f"POST {path}?{urlencode(options)} HTTP/1.1\r\nhost: x\r\ncontent-type: {content_type}\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


@contextmanager
def under_way(server: Server) -> Iterator[socket.socket]:
    """ENDLESS for BATCH on the endless server, which does nothing else: the engine has it. The client hangs up at the
    end, and the engine has dropped it."""
    comes_to(lambda: in_flight(server), 0)
    with server.connect() as connection:
        connection.sendall(request("/classify", npy(BATCH), content_type="application/x-npy", **ENDLESS))
        comes_to(lambda: in_flight(server), 1)
        yield connection
    comes_to(lambda: in_flight(server), 0)
    comes_to(lambda: sample(server.metrics(), 'carso_queue_rows{path="robust"}'), 0)


def started_body(server: Server, path: str, size: int) -> socket.socket:
    """A connection whose request has a body of `size` bytes that does not come; the server waits for it."""
    connection = server.connect()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\nexpect: 100-continue\r\n\r\n"
    connection.sendall(head.encode())
    told = b""
    while not told.endswith(b"\r\n\r\n"):
        told += connection.recv(1)
    assert told.startswith(b"HTTP/1.1 100"), told  # which is sent when the application asks for the body
    return connection


def logged(server: Server, request_id: str, *, lines: int = 1) -> list[dict[str, Any]]:
    """The lines of the log about a request, which follow the answer; waits until there are as many."""

    def found() -> list[dict[str, Any]]:
        whole = server.log.read_text().rpartition("\n")[0].splitlines()
        about = [line for line in map(json.loads, whole) if line.get("request_id") == request_id]
        assert len(about) >= lines
        return about

    return eventually(found)
