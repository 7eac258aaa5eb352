"""Uvicorn's HTTP protocol, bounded. By itself it waits for a request without end, holds heads and trailers of any size,
and answers what it cannot read in a form of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from carso.errors import HeadTooLarge, MalformedRequest, RequestError
from carso.http.exchange import ABORT, UNTIMED
from carso.http.joined import Joined
from carso.http.upgrades import SteadfastParser

NOT_HTTP = "this is not an HTTP/1.1 request: use an HTTP client"
HEAD_BYTES = 64 * 2**10  # request line and headers; nginx takes 32 KiB, Apache 8 KiB a line
LAST = 1.0  # seconds that a new connection has to begin its first request, once the port is closed
GRACE = 1.0  # seconds to wait for a body's end longer than the application does, which then answers 408
KEY_BYTES = 24  # of a handshake of WebSocket: base64 of 16


def bounded(
    receive_timeout: float, unread: Callable[[RequestError], bytes], *, web_socket: str
) -> type[HttpToolsProtocol]:
    """Return the protocol. It gives a client `receive_timeout` seconds for a request's head, and as many for its body.

    `unread` makes the whole answer to what is refused here, before the application sees it. `web_socket`: the path at
    which an offer of WebSocket is taken, without a prefix.
    """

    class Bounded(HttpToolsProtocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.parser = SteadfastParser(self)  # type: ignore[assignment]
            self._malformed = NOT_HTTP
            self._timer: asyncio.TimerHandle | None = None
            # seconds for what has begun: a head, or a body; None: nothing has. Timed, from the end of the bytes that
            # began it: most requests come whole, and need no timer.
            self._seconds: float | None = None
            self._timed = True
            # bytes since a message began, its headers ended, or some of its body came: of its head, or of trailers and
            # what else surrounds the chunks of a body; None: no message is under way
            self._head: int | None = 0
            self._upgraded = False  # the connection is no longer ours

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._close_after(receive_timeout)

        def data_received(self, data: bytes) -> None:
            if self._head is not None:
                self._head += len(data)
            super().data_received(data)  # may end this head, and begin others
            if self._upgraded:
                return
            if not self._timed:
                self._close_after(self._seconds)
            if self._head is not None:
                if self._head > HEAD_BYTES and not self.transport.is_closing():
                    what = "the request line and headers, or the trailers,"
                    self._refuse(HeadTooLarge(f"{what} have more than {HEAD_BYTES} bytes: send fewer"))
            elif self._timer is None and (self.cycle is None or self.cycle.response_complete):
                # an empty line, after which uvicorn no longer times how long the connection is idle
                self._close_after(receive_timeout)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            calls: Any = {UNTIMED: partial(self._close_after, None), ABORT: self.transport.abort}
            self.scope["extensions"] = calls
            self._head = 0
            self._begin(receive_timeout)

        def on_headers_complete(self) -> None:
            self._head = 0
            self._begin(receive_timeout + GRACE)
            hosts = sum(name == b"host" for name, _ in self.headers)
            if hosts > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
                self._malformed = f"a request of HTTP/1.1 has one header Host, and this one has {hosts}: send one"
                raise httptools.HttpParserError(self._malformed)  # which uvicorn answers by send_400_response
            earlier = self.cycle
            super().on_headers_complete()
            if self.cycle is not earlier and self.cycle.scope["method"] != "HEAD":  # uvicorn begins it in a later turn
                self.cycle.transport = Joined(self.cycle)  # type: ignore[assignment]

        def on_body(self, body: bytes) -> None:
            self._head = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._head = None
            self._begin(None)
            super().on_message_complete()

        def takes_upgrade(self) -> bool:
            """Tell whether a GET offers WebSocket where streams are, and no answer to an earlier request is due."""
            headers = dict(self.headers)
            return (
                self.parser.get_method() == b"GET"
                and self._should_upgrade()
                and headers.get(b"sec-websocket-version") == b"13"
                and len(headers.get(b"sec-websocket-key", b"")) == KEY_BYTES
                and self.url.partition(b"?")[0].endswith(web_socket.encode())
                and (self.cycle is None or self.cycle.response_complete)
            )

        def handle_websocket_upgrade(self) -> None:
            self._upgraded = True
            self._close_after(None)
            super().handle_websocket_upgrade()
            talk: Any = self.transport.get_protocol()
            if not talk.handshake_initiated:  # its parser takes less than ours
                self._refuse(
                    HeadTooLarge("a header of a WebSocket has more than 8 KiB, or there are too many: send fewer")
                )

        def shutdown(self) -> None:
            """Close the connection once no request can be on its way, as the port is closed.

            uvicorn by itself drops a connection that has not sent its whole head yet. But the client was connected in
            time, and has no other way to tell that its request was not taken.
            """
            if self.cycle is not None and not self.cycle.response_complete:
                super().shutdown()  # the answer is the last one
            elif self._seconds is None and self.cycle is None:
                self._close_after(min(LAST, receive_timeout))
            elif self._seconds is None:
                super().shutdown()  # it is idle
            # else a head is on its way, its time runs, and the answer, which says so, is the last one

        def connection_lost(self, exc: Exception | None) -> None:
            self._close_after(None)
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self._refuse(MalformedRequest(self._malformed))

        def _refuse(self, error: RequestError) -> None:
            answer = unread(error)
            if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                self.transport.write(answer)
            self.transport.close()

        def _begin(self, seconds: float | None) -> None:
            self._seconds, self._timed = seconds, False

        def _close_after(self, seconds: float | None) -> None:
            """Close the connection in so many seconds; None: stop the timer."""
            self._timed = True
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.close)

    return Bounded
