"""Lines both ways over a WebSocket (RFC 6455): its messages."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from types import TracebackType

from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from carso.errors import ClientGone
from carso.http.disconnect import WhileConnected
from carso.http.exchange import ABORT

_GONE = (WebSocketDisconnect, RuntimeError)  # what Starlette raises at the first message that cannot be sent, and then
_LONGEST_END = 64  # bytes of a message that is looked at for an end


class MessageLines:
    """`carso.http.lines.Lines` over a WebSocket: each message is a line. Longer ones end the connection (1009)."""

    def __init__(self, talk: WebSocket) -> None:
        self._talk = talk
        self._connected = WhileConnected(self._take, after=0)
        self._line: bytes | None = None  # that waits
        self._over = False  # the client sends no more, or its lines are not wanted any more
        self._came = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def __aenter__(self) -> None:
        """Answer the handshake, and begin to listen."""
        await self._talk.accept()
        await self._connected.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the conversation."""
        await self._connected.__aexit__(kind, error, traceback)
        if error is None:
            with suppress(*_GONE):  # whoever has the last line may have left
                await self._talk.close()

    async def read(self) -> bytes | None:
        """As of Lines. A message {"end": true} is the last one."""
        while not self._over:
            if self._line is not None:
                line, self._line = self._line, None
                self._room.set()
                if not _is_end(line):
                    return line
                self._over = True
                break
            self._came.clear()
            await self._came.wait()
        return None

    async def write(self, line: bytes) -> None:
        """As of Lines. Nothing is sent for an empty line: the protocol has pings. Raises ClientGone."""
        if not line:
            return
        try:
            await self._talk.send_text(line.decode())
        except _GONE:
            raise ClientGone("the client closed the connection before the answer was ready") from None

    async def linger(self) -> None:
        """As of Lines. The end of the conversation is agreed on, so no line is lost."""

    def stop(self) -> None:
        """As of Lines."""
        self._over = True
        self._came.set()

    def abort(self) -> None:
        """As of Lines."""
        if abort := (self._talk.scope.get("extensions") or {}).get(ABORT):
            abort()

    async def _take(self) -> Message:
        """Take the next message: what listens for the client's end awaits this."""
        await self._room.wait()
        message = await self._talk.receive()
        if message["type"] == "websocket.disconnect":
            return {"type": "http.disconnect"}
        text = message.get("text")
        self._line = message.get("bytes") or b"" if text is None else text.encode()
        self._room.clear()
        self._came.set()
        return message


def _is_end(line: bytes) -> bool:
    if len(line) > _LONGEST_END or b"end" not in line:
        return False
    try:
        return bool(json.loads(line) == {"end": True})
    except ValueError:
        return False
