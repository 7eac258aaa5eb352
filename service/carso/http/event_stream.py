"""An answer that comes as server-sent events, while the work that it is about goes on.

Each event has a name and one line of JSON. Until the first one there is no answer yet, so an error is an ordinary one,
with its status; later it is the last event, `error`. https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Mapping
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from carso.http.exchange import Exchange

MEDIA_TYPE = "text/event-stream"
ERROR = "error"
# The last one asks nginx, and what behaves like it, to pass every event on at once.
_HEADERS = [(b"content-type", MEDIA_TYPE.encode()), (b"x-accel-buffering", b"no")]

Content = Mapping[str, Any]
Tell = Callable[[str, Hashable, Content], None]
"""Tell the client, by the name of an event, about something, this content. What it did not read yet is replaced by what
is newer about the same thing, so that a slow client costs no memory."""


def wanted(accept: str) -> bool:
    """Tell from the header Accept whether a client wants events: whether they are the first thing that it names."""
    return accept.partition(",")[0].partition(";")[0].strip().lower() == MEDIA_TYPE


class EventStream(Response):
    """The events that `work` tells, and then a last one with what it returns.

    Raises, before the first event, whatever `work` does.
    """

    def __init__(
        self,
        work: Callable[[Tell], Awaitable[Content]],
        *,
        last: str,
        failed: Callable[[Exception, Exchange], Content],
    ) -> None:
        """`last`: the name of the last event. `failed` notes an error of `work`, and returns what the client is told of
        it.
        """
        super().__init__()
        self._work = work
        self._last = last
        self._failed = failed
        self._waiting: dict[tuple[str, Hashable], Content] = {}
        self._more = asyncio.Event()
        self._whole = False
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Work, and send meanwhile."""
        sending = asyncio.create_task(self._send(send))
        try:
            try:
                self._tell(self._last, None, await self._work(self._tell))
            except Exception as e:
                if not self._started:
                    raise
                self._tell(ERROR, None, self._failed(e, Exchange.of(scope)))
            self._whole = True
            self._more.set()
            await sending
        finally:
            sending.cancel()

    def _tell(self, name: str, about: Hashable, content: Content) -> None:
        self._waiting.pop((name, about), None)  # what is newer comes later
        self._waiting[name, about] = content
        self._more.set()

    async def _send(self, send: Send) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            ready, self._waiting = self._waiting, {}
            body = b"".join(_event(name, content) for (name, _), content in ready.items())
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": 200, "headers": _HEADERS.copy()})
            whole = self._whole and not self._waiting
            await send({"type": "http.response.body", "body": body, "more_body": not whole})
            if whole:
                return


def _event(name: str, content: Content) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + to_json(content) + b"\n\n"
