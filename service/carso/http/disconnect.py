"""End the work for a client that has hung up."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive

from carso.errors import ClientGone

# Most answers are given before this, and need no task that listens for the client meanwhile.
WATCH_AFTER = 0.1  # seconds


class WhileConnected:
    """Cancels what is awaited inside `async with WhileConnected(receive)` if the client hangs up; raises ClientGone.

    Enter it after the body was read to its end. It works like asyncio.timeout, with the client for a clock.
    """

    def __init__(self, receive: Receive, *, after: float = WATCH_AFTER) -> None:
        """`after`: seconds until the client is listened for."""
        self._receive = receive
        self._after = after
        self._watcher: asyncio.Task[None] | None = None
        self._gone = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("WhileConnected must be used inside a task")
        self._task = task
        self._cancelling = task.cancelling()
        self._timer = asyncio.get_running_loop().call_later(self._after, self._watch)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        # as asyncio.timeout: a cancellation from elsewhere stays one
        if self._gone and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise ClientGone("the client closed the connection before the answer was ready") from error

    def _watch(self) -> None:
        self._watcher = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()
