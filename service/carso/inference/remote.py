"""An engine in another process, which several processes share: the side that asks, and what both sides say.

A GPU belongs to one process. Where requests are more than one event loop can take, several processes take them, and
each has a connection to the one that has the engine. The first message over it tells what the engine can do.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from carso.choices import PathName
from carso.inference.abilities import Abilities
from carso.inference.engine import Door, Report
from carso.inference.jobs import Job, Kinds, News, Result, Ticket
from carso.inference.wire import Unpacker, packed


class EngineLost(Exception):  # noqa: N818  a state of the other process
    """The process that has the engine has ended, or has closed the connection."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A job, by the number that it has on its connection."""

    number: int
    job: Job
    followed: Kinds


@dataclass(frozen=True, slots=True)
class Left:
    """Nobody waits for a job any more."""

    number: int


@dataclass(frozen=True, slots=True)
class Told:
    """What the engine has done for one connection since it last told."""

    news: list[tuple[int, News]]  # by the numbers of the jobs
    results: list[tuple[int, Result]]
    paces: Mapping[PathName, float]  # rows per second on each path, of the engine as a whole


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine has failed, or takes no more jobs."""

    why: str


class Remote:
    """Has the engine of another process run jobs: a Runner, as ``carso.inference.engine`` has it.

    What a job owes is settled when it ends, not while it goes on.
    """

    def __init__(self, connection: socket.socket, *, share: float = 1.0) -> None:
        """Wait until the engine says what it can do. `share`: of its pace, that counts as this process's own.

        Raises EngineLost.
        """
        self.progress = 0.0
        self._connection = connection
        self._share = share
        self._unpacker = Unpacker()
        self._numbers: dict[Ticket, int] = {}  # of the jobs that the engine has
        self._tickets: dict[int, Ticket] = {}
        self._given = 0
        self._link: asyncio.Transport | None = None
        self._kept: list[Any] = []  # messages, until there is a link
        self._stopped = False
        self.abilities: Abilities = self._greeting()

    @property
    def busy(self) -> bool:
        """As Runner."""
        return bool(self._tickets)

    def start(self, door: Door) -> None:
        """As Runner."""
        self._door = door
        self._connecting = door.loop.create_task(self._connect(door.loop))

    def give(self, tickets: list[Ticket]) -> None:
        """As Runner."""
        asked = []
        for ticket in tickets:
            self._given += 1
            self._numbers[ticket], self._tickets[self._given] = self._given, ticket
            asked.append(Asked(self._given, ticket.job, ticket.followed))
        self._send(asked)

    def leave(self, ticket: Ticket) -> None:
        """As Runner."""
        self._door.admission[ticket.job.path].settle_all(ticket.job.rows)
        if (number := self._numbers.pop(ticket, None)) is not None:
            del self._tickets[number]
            self._send([Left(number)])

    async def stop(self, timeout: float) -> None:
        """As Runner: the connection ends, and the engine goes on for others."""
        self._stopped = True
        self._connecting.cancel()
        if self._link is not None:
            self._link.close()

    def received(self, data: bytes) -> None:
        """Take what came over the connection."""
        for told in self._unpacker.feed(data):
            self.progress = time.monotonic()
            match told:
                case Failed(why):
                    self._door.failed(EngineLost(why))
                case Told(news, results, paces):
                    for path, pace in paces.items():
                        self._door.admission[path].tell_pace(pace * self._share)
                    found = [(self._tickets[number], each) for number, each in news if number in self._tickets]
                    ended = [(self._forget(number), each) for number, each in results if number in self._tickets]
                    self._door.report(Report(found, ended))

    def lost(self) -> None:
        """Take note that the connection has ended."""
        if not self._stopped:
            self._door.failed(EngineLost("the process that has the engine has ended"))

    def _forget(self, number: int) -> Ticket:
        ticket = self._tickets.pop(number)
        del self._numbers[ticket]
        return ticket

    def _greeting(self) -> Abilities:
        self._connection.setblocking(True)
        while data := self._connection.recv(65536):
            for abilities in self._unpacker.feed(data):
                return cast(Abilities, abilities)
        raise EngineLost("the process that has the engine ended before it was ready")

    async def _connect(self, loop: asyncio.AbstractEventLoop) -> None:
        self._connection.setblocking(False)
        await loop.create_unix_connection(lambda: _Link(self), sock=self._connection)

    def linked(self, link: asyncio.Transport) -> None:
        """Take the connection."""
        self._link = link
        for message in self._kept:
            link.writelines(packed(message))
        self._kept.clear()

    def _send(self, message: Any) -> None:
        if self._link is None:
            self._kept.append(message)
        elif not self._link.is_closing():
            self._link.writelines(packed(message))


class _Link(asyncio.Protocol):
    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._remote.linked(cast(asyncio.Transport, transport))

    def data_received(self, data: bytes) -> None:
        self._remote.received(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._remote.lost()
