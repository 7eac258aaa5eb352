"""A client that reads and writes at once over one request: what it sends may depend on what it has read."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import h11
from carso.api.frames import Line
from pydantic import TypeAdapter

from tests.calls import PNG
from tests.server import Server

TEXT = base64.b64encode(PNG).decode()  # an image for the server of conftest.py
PATH = "/classify/stream"
_LINE = TypeAdapter(Line)


class Duplex:
    """One stream, over a real connection. Every line that is read is one of those that the schema knows."""

    def __init__(self, connection: socket.socket, headers: dict[str, str], **options: object) -> None:
        self.socket = connection
        self._http = h11.Connection(h11.CLIENT)
        self._text = b""
        target = f"{PATH}?{urlencode(options)}"
        named = [("host", "x"), ("transfer-encoding", "chunked"), *headers.items()]
        self.send_event(h11.Request(method="POST", target=target, headers=named))

    def send_event(self, event: h11.Event) -> None:
        self.socket.sendall(self._http.send(event))

    def send_text(self, text: bytes) -> None:
        self.send_event(h11.Data(data=text))

    def send(self, image: object = TEXT, **frame: object) -> None:
        self.send_text(json.dumps({"image": image, **frame}).encode() + b"\n")

    def end(self) -> None:
        self.send_event(h11.EndOfMessage())

    def head(self) -> h11.Response:
        """The head of the answer, which comes before a frame is sent."""
        return self._next_event()

    def line(self) -> dict[str, Any]:
        """The next line that is not empty."""
        while True:
            while b"\n" not in self._text:
                event = self._next_event()
                assert isinstance(event, h11.Data), event
                self._text += bytes(event.data)
            line, _, self._text = self._text.partition(b"\n")
            if line:
                _LINE.validate_json(line)
                return json.loads(line)

    def lines(self) -> list[dict[str, Any]]:
        """All lines that still come, to the last one."""
        found = [self.line()]
        while "end" not in found[-1]:
            found.append(self.line())
        return found

    def _next_event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(self.socket.recv(65536))
        return event


@contextmanager
def streaming(server: Server, *, headers: dict[str, str] | None = None, **options: object) -> Iterator[Duplex]:
    """A stream whose first line was read."""
    with server.connect() as connection:
        stream = Duplex(connection, headers or {}, **options)
        head = stream.head()
        assert head.status_code == 200, (head, stream._next_event())
        assert stream.line()["stream"] == dict(head.headers)[b"x-request-id"].decode()
        yield stream
