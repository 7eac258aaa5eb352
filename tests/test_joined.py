"""One write for the head of an answer and the first of its body."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from carso.http.joined import Joined

from tests.calls import PNG, request


class Recorded:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


@pytest.fixture
def transport() -> Recorded:
    return Recorded()


def answer(transport: Recorded) -> Any:
    """An answer that has begun, as uvicorn's cycle shows it."""
    return SimpleNamespace(transport=transport, response_started=True)


def test_an_answer_comes_in_one_piece(server):
    with server.connect() as connection:
        connection.sendall(request("/classify/fast", PNG, content_type="image/png"))
        head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert len(body) == int(head.lower().partition(b"content-length: ")[2].split()[0])


def test_the_head_waits_for_the_first_of_the_body_only(transport):
    joined = Joined(answer(transport))
    for part in (b"head", b"first", b"second"):
        joined.write(part)
    assert transport.written == [b"headfirst", b"second"]


def test_a_body_of_nothing_lets_the_head_go(transport):
    joined = Joined(answer(transport))
    joined.write(b"head")
    joined.write(b"")
    assert transport.written == [b"head"]


def test_what_comes_before_an_answer_does_not_wait(transport):
    cycle = answer(transport)
    cycle.response_started = False
    joined = Joined(cycle)
    joined.write(b"100 Continue")
    assert transport.written == [b"100 Continue"]


def test_an_answer_that_ends_after_its_head_leaves_that_much(transport):
    joined = Joined(answer(transport))
    joined.write(b"head")
    joined.close()
    assert transport.written == [b"head"]
    assert joined.is_closing()
