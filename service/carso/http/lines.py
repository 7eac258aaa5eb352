"""Lines both ways over one request: those of a body that need not end, and those of an answer that goes on meanwhile.

The body is taken as fast as its lines are, so a client that sends more than is done is slowed down by TCP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Protocol

from starlette.types import Message, Receive, Scope, Send

from carso.errors import BodyTooLarge, ClientGone
from carso.http.disconnect import WhileConnected
from carso.http.exchange import ABORT, UNTIMED
from carso.images.media_types import NDJSON

AHEAD = 64 * 2**10  # bytes of a body that are taken although a line waits; until then a hang-up is noticed at once
# Seconds to go on taking a body after the last line: with a body unread, TCP could lose that line. Less than what the
# server gives bodies that never end, when it stops.
LINGER = 0.5


class Lines(Protocol):
    """Lines from a client and to it. Use it as a context manager; what is done inside is cancelled if the client goes,
    and ClientGone raised.
    """

    async def __aenter__(self) -> None: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    async def read(self) -> bytes | None:
        """Return the next line, without its end; None: there are no more. Raises BodyTooLarge for one that is too long,
        and goes on with the next. May be cancelled without loss.
        """

    async def write(self, line: bytes) -> None:
        """Send a line, and its end. Waits while the client does not take what was sent before."""

    async def linger(self) -> None:
        """Take what the client still sends, for a moment, and drop it: else the last line might be lost."""

    def stop(self) -> None:
        """Let `read` return no more lines."""

    def abort(self) -> None:
        """Cut the connection."""


class BodyLines:
    """The lines of a request's body and of its answer: `Lines` over HTTP/1.1."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, longest: int) -> None:
        """`longest`: bytes of a line."""
        self._extensions: dict[str, Callable[[], None]] = scope.get("extensions") or {}
        self._receive, self._send = receive, send
        self._longest = longest
        self._connected = WhileConnected(self._take, after=0)
        self._buffer = bytearray()
        self._searched = 0  # bytes at the beginning of the buffer that hold no line end
        self._skipping = False  # what comes belongs to a line that was too long, until its end
        self._whole = False  # the body has ended
        self._stopped = False
        self._came = asyncio.Event()  # something, since it was last looked for
        self._room = asyncio.Event()
        self._room.set()

    async def __aenter__(self) -> None:
        """Begin the answer, and the taking of the body."""
        if untimed := self._extensions.get(UNTIMED):
            untimed()
        headers = [
            (b"content-type", NDJSON.encode()),
            (b"connection", b"close"),  # what is left of the body would be taken for the next request
            (b"x-accel-buffering", b"no"),  # nginx would hold the answer back
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": b"", "more_body": True})  # the head waits for it
        await self._connected.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the answer."""
        await self._connected.__aexit__(kind, error, traceback)
        if error is None:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def read(self) -> bytes | None:
        """As of Lines."""
        while not self._stopped:
            end = self._buffer.find(b"\n", self._searched)
            if end >= 0 or (self._whole and self._buffer):
                line = bytes(self._buffer[:end] if end >= 0 else self._buffer)
                del self._buffer[: end + 1 if end >= 0 else len(self._buffer)]
                self._searched = 0
                self._make_room()
                if self._skipping:
                    self._skipping = False
                    continue
                if len(line) > self._longest:
                    raise self._too_long()
                return line
            if len(self._buffer) > self._longest or self._skipping:
                begins = not self._skipping
                self._buffer.clear()
                self._searched = 0
                self._skipping = True
                self._make_room()
                if begins:
                    raise self._too_long()
            if self._whole:
                break
            self._searched = len(self._buffer)
            self._came.clear()
            await self._came.wait()
        return None

    async def write(self, line: bytes) -> None:
        """As of Lines."""
        await self._send({"type": "http.response.body", "body": line + b"\n", "more_body": True})

    async def linger(self) -> None:
        """As of Lines."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while not self._whole:
                    self._buffer.clear()
                    self._make_room()
                    self._came.clear()
                    await self._came.wait()

    def stop(self) -> None:
        """As of Lines."""
        self._stopped = True
        self._came.set()

    def abort(self) -> None:
        """As of Lines. A server that is not ours closes the connection when the answer is given up, and logs that."""
        if abort := self._extensions.get(ABORT):
            abort()

    async def _take(self) -> Message:
        """Take the next part of the body into the buffer: what listens for the client's end awaits this."""
        await self._room.wait()
        message = await self._receive()
        if message["type"] == "http.request":
            self._buffer += message.get("body", b"")
            self._whole = not message.get("more_body", False)
            self._make_room()
            self._came.set()
        return message

    def _make_room(self) -> None:
        """Let more of the body come, unless whole lines wait already."""
        if len(self._buffer) <= AHEAD or b"\n" not in self._buffer:
            self._room.set()
        else:
            self._room.clear()

    def _too_long(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"the line has more than the {self._longest} bytes that are allowed: send a smaller image, or encode it"
        )


async def gone(lines: Lines) -> None:
    """Cut the connection of a client that does not take its answers, and wait for that. Raises ClientGone."""
    lines.abort()
    await asyncio.sleep(LINGER)
    raise ClientGone("the client did not take its answers in time")
