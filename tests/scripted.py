"""A real HTTP server that answers what a test has written down: refusals, broken connections, silence."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

DRIP = 0.05  # seconds between the bytes of an answer that drips


@dataclass(frozen=True)
class Reply:
    status: int
    content: Any = ""  # a string as it is, all else as JSON
    headers: dict[str, str] = field(default_factory=dict)
    drips: bool = False


HangUp = Literal["hang up"]
Silence = Literal["silence"]
Step = Reply | HangUp | Silence


@dataclass(frozen=True)
class Received:
    path: str
    query: dict[str, str]
    headers: dict[str, str]  # lower case names
    body: bytes
    at: float  # time.monotonic()


@dataclass(frozen=True)
class Scripted:
    url: str
    received: list[Received]


@contextmanager
def scripted(*steps: Step, bound: socket.socket | None = None) -> Iterator[Scripted]:
    """A server that takes these steps, one for each request, and the last one for all that follow.

    It listens on `bound` (tests.server.silent_port), or on a free port.
    """
    received: list[Received] = []
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def answer(self) -> None:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            received.append(Received(url.path, dict(parse_qsl(url.query)), headers, body, time.monotonic()))
            step = steps[min(len(received), len(steps)) - 1]
            if isinstance(step, Reply):
                self.reply(step)
                return
            if step == "silence":
                over.wait(60)
            self.close_connection = True

        def reply(self, reply: Reply) -> None:
            content = reply.content if isinstance(reply.content, str) else json.dumps(reply.content)
            self.send_response(reply.status)
            for name, value in ({"Content-Length": str(len(content.encode()))} | reply.headers).items():
                self.send_header(name, value)
            self.end_headers()
            for byte in content if reply.drips else ():
                if over.wait(DRIP):
                    return
                self.wfile.write(byte.encode())
            if not reply.drips:
                self.wfile.write(content.encode())

        def log_message(self, *_: object) -> None:
            """Nothing."""

    class Listener(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Nothing: clients that go away are part of the tests."""

    server = Listener(("127.0.0.1", 0), Handler, bind_and_activate=bound is None)
    if bound is not None:
        server.socket.close()
        server.socket = bound
        server.server_address = bound.getsockname()
        server.server_name, server.server_port = server.server_address
        server.server_activate()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Scripted(f"http://127.0.0.1:{server.server_port}", received)
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()


def refusal(status: int, error: str, message: str = "no", *, retry_after: object = None) -> Reply:
    """As the service refuses."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return Reply(status, {"error": error, "message": message, "request_id": "of-the-service"}, headers)


SERVED = {
    "bundle": {"name": "b", "version": "1", "checksum": "0"},
    "provider": "CPUExecutionProvider",
    "request_id": "of-the-service",
}
LABEL_ONLY = Reply(200, {"predictions": [{"label": 3, "class_name": "three", "complete": True}], **SERVED})
