"""Uvicorn, taught to stop in good order.

SIGTERM or SIGINT -> readiness fails; the listener stays open for a while, because whoever routes requests here takes
time to notice -> the listener closes, and requests in flight finish -> those that do not in time are told so -> exit.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from carso.board.whole import State
from carso.errors import RequestError
from carso.telemetry.probes import Lifecycle

log = logging.getLogger(__name__)

TAKEN_FOR = 5.0  # seconds, at most, in which connections that came before the end are still taken
TOLD_EVERY = 10.0  # seconds between two lines of the log about the same shortage


class Grpc(Protocol):
    """A server of gRPC in the same event loop: ``carso.grpc.server.GrpcServer``."""

    def open(self, sockets: Sequence[socket.socket]) -> None:
        """Take the ports of these bound sockets. Raises CannotListen."""

    async def start(self) -> None:
        """Take calls."""

    async def stop(self, grace: float) -> None:
        """Refuse new calls at once, and end those in flight after `grace` seconds."""


@dataclass(frozen=True, slots=True)
class Service:
    """An application, and what the server around it has to know of it."""

    app: ASGIApp
    lifecycle: Lifecycle  # to be told when the process drains
    abandon: Callable[[], None]  # ends the work that is in flight
    reload: Callable[[], None]  # reads again what may change while it serves: the keys
    unread: Callable[[RequestError], bytes]  # makes the whole answer to a request that the HTTP parser refuses
    state: Callable[[], State]  # tells whether the engine is well
    served: dict[str, object]  # what the log and a supervisor are told of it
    web_socket: str  # the path at which WebSocket is spoken
    grpc: Grpc | None  # None: this service speaks HTTP only


class Post(Protocol):
    """Whoever a worker's server reports to: ``carso.workers.worker.Worker``."""

    def begin(
        self,
        *,
        served: dict[str, object],
        state: Callable[[], State],
        reload: Callable[[], None],
        stop: Callable[[], None],
    ) -> None:
        """Report that the server takes requests, on the event loop."""

    def goes_on(self) -> bool:
        """Report how it is, ten times a second. False: it should end, for another to take its place."""


class Server(uvicorn.Server):
    """Runs an application until a signal ends it. A second signal skips what is left of the delay."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        *,
        delay: float,
        timeout: float,
        post: Post | None = None,
        grpc_sockets: Sequence[socket.socket] = (),
    ) -> None:
        """`delay` and `timeout` in seconds. `post`: None where this process is alone. `grpc_sockets`: bound
        ones, for gRPC.
        """
        super().__init__(config)
        service.lifecycle.managed = True
        config.timeout_graceful_shutdown = math.ceil(timeout) + 1  # for bodies that never end; all else has ended
        self._service = service
        self._lifecycle = service.lifecycle
        self._post = post
        self._delay = delay
        self._timeout = timeout
        self._closing_at = math.inf  # on the clock of time.monotonic
        self._told_at = -math.inf
        self._grpc = service.grpc
        self._grpc_sockets = grpc_sockets

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, and take connections. Raises CannotListen."""
        if self._grpc is not None:
            self._grpc.open(self._grpc_sockets)
        await super().startup(sockets)
        if self._grpc is not None:
            await self._grpc.start()
        if sys.platform != "win32":
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._service.reload)
        if self._post is not None:
            self._post.begin(
                served=self._service.served,
                state=self._service.state,
                reload=self._service.reload,
                stop=lambda: self.handle_exit(signal.SIGTERM, None),
            )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal; close the port at the second."""
        if self._lifecycle.draining or not self._delay:
            super().handle_exit(sig, frame)
        else:
            self._closing_at = time.monotonic() + self._delay
        self._lifecycle.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Tell whether to exit, ten times a second; and look whether there is a file descriptor left.

        Without one, the event loop takes no connection and says nothing.
        """
        self._look_for_descriptors()
        if self._post is not None and not self._post.goes_on():
            self._lifecycle.draining = self.should_exit = True
        if self._lifecycle.draining:
            self._lifecycle.stopping.set()
        self.should_exit = self.should_exit or time.monotonic() >= self._closing_at
        return await super().on_tick(counter)

    async def _take_what_came(self, sockets: Sequence[socket.socket]) -> None:
        """Take the connections that wait in the kernel, and read what was sent over those that look idle.

        A client whose connection was made takes its request for accepted. But when the port closes, the kernel resets
        every connection that was not taken; and closing one that holds unread bytes resets it too. The event loop takes
        and reads in its own turns, of which a busy processor leaves it few: so it gets some more.
        """
        end = time.monotonic() + min(TAKEN_FOR, self._timeout)
        with selectors.DefaultSelector() as selector:
            for each in sockets:
                selector.register(each, selectors.EVENT_READ)
            while True:
                for _ in range(2):  # turns, one to wake up in and a whole one
                    await asyncio.sleep(0)
                if not sockets or not selector.select(0) or time.monotonic() >= end:
                    return

    def _look_for_descriptors(self) -> None:
        try:
            socket.socket().close()
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE) and time.monotonic() - self._told_at >= TOLD_EVERY:
                self._told_at = time.monotonic()
                log.error(
                    "no file descriptor is left, so new connections are refused: raise the limit (ulimit -n), or limit "
                    "connections in a proxy in front",
                    extra={"fields": {"connections": len(self.server_state.connections)}},
                )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, wait for requests in flight, and end those that take too long."""
        self._lifecycle.stopping.set()
        await self._take_what_came(sockets or [])
        timer = asyncio.get_running_loop().call_later(self._timeout, self._service.abandon)
        ending = [] if self._grpc is None else [self._grpc.stop(self._timeout + 1)]  # all that can has ended by then
        await asyncio.gather(super().shutdown(sockets), *ending)
        timer.cancel()
