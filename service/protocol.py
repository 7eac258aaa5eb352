"""Uvicorn's HTTP protocol, which by itself waits for a request without end and holds heads of any size."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 64 * 2**10  # request line and headers; nginx takes 32 KiB, Apache 8 KiB a line
GRACE = 1.0  # seconds after which a body's end is no longer waited for, more than the application waits: it answers 408

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def bounded(receive_timeout: float) -> type[HttpToolsProtocol]:
    """The protocol, which gives a client so many seconds for a request's head, and as many for its body."""

    class Bounded(HttpToolsProtocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._timer: asyncio.TimerHandle | None = None
            self._head: int | None = 0  # bytes of a head that is under way; None: none is

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._close_after(receive_timeout)

        def data_received(self, data: bytes) -> None:
            if self._head is not None:
                self._head += len(data)
            super().data_received(data)  # may end this head, and begin others
            if self._head is not None and self._head > HEAD_BYTES and not self.transport.is_closing():
                self.transport.write(_TOO_LARGE)
                self.transport.close()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._head = 0
            self._close_after(receive_timeout)

        def on_headers_complete(self) -> None:
            self._head = None
            self._close_after(receive_timeout + GRACE)
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._keep()
            super().on_message_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._keep()
            super().connection_lost(exc)

        def _close_after(self, seconds: float) -> None:
            self._keep()
            self._timer = self.loop.call_later(seconds, self.transport.close)

        def _keep(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Bounded
