"""One write for the head of an answer and the first of its body."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class Joined:
    """The transport that uvicorn writes one answer to: its head waits for the first of its body.

    ASGI asks servers for that. Besides, two writes are two system calls and two packets, and wake the client up twice.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        """`cycle`: the request and its answer. Not for HEAD, whose answers have no body to wait for."""
        self._cycle = cycle
        self._transport: asyncio.Transport = cycle.transport
        self._begun = False
        self._head = b""

    def write(self, data: bytes) -> None:
        """Write some of the answer; or, before it has begun, that the body is waited for (100 Continue)."""
        if self._cycle.response_started and not self._begun:
            self._begun = True
            self._head = data
        else:
            self._transport.write(self._head + data)
            self._head = b""

    def close(self) -> None:
        """Close the connection after what was written."""
        if self._head:
            self.write(b"")
        self._transport.close()

    def is_closing(self) -> bool:
        """Tell whether the connection is closed, or about to be."""
        return self._transport.is_closing()
