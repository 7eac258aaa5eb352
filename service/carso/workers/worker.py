"""This process as a worker: what it got from the supervisor, and what it tells it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from carso.board.memory import Memory
from carso.board.seat import Board, Seat
from carso.board.whole import State
from carso.inference.processors import usable_cpus
from carso.settings import Settings
from carso.workers.placement import places, usable_nodes

log = logging.getLogger(__name__)

LOST_ENGINE = 75  # exit status of a worker that had no engine to begin with (EX_TEMPFAIL of sysexits.h)
VARIABLE = "_CARSO_WORKER"  # of the environment: what a process needs to be a worker


class Worker:
    """What the supervisor gave: a number, a seat at the board, the sockets to listen on, and a channel to itself.

    The channel ends with the supervisor. A worker does not outlive it for longer than its requests take.

    Where all workers share one engine, the process that has it is the worker whose number is the last. It has no
    sockets to listen on, and each of the others has a connection to it.
    """

    def __init__(self, *, number: int, board: int, channel: int, sockets: list[int], engine: int | None = None) -> None:
        """All but `number` are file descriptors. `engine`: of a connection to a shared engine."""
        self.number = number
        self.board = Board(Memory(board))
        self.whole = Seat(self.board, number)
        self.sockets = [socket.socket(fileno=descriptor) for descriptor in sockets]
        self.engine = None if engine is None else socket.socket(fileno=engine)
        self._channel = socket.socket(fileno=channel)
        self._reloads = self.board.reloads  # before the keys are read for the first time
        self._state: Callable[[], State] = lambda: State.LOADING
        self._reload: Callable[[], None] = lambda: None
        self.board.take(number, os.getpid())

    @classmethod
    def here(cls) -> Worker:
        """Return this process as a worker. Raises KeyError if it is none."""
        return cls(**json.loads(os.environ.pop(VARIABLE)))

    @property
    def has_the_engine(self) -> bool:
        """Whether this is the process of the engine that all workers share."""
        return self.number == self.board.engine

    def settled(self, settings: Settings) -> Settings:
        """Go to this worker's place among the processors, and return the settings with its share of the threads."""
        share = {"decode_threads": max(1, settings.decode_threads // self.board.workers)}
        if self.has_the_engine or self.engine is not None:  # one engine, which may use all processors
            return settings.model_copy(update=share)
        allowed = os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)
        place = places(self.board.workers, nodes=usable_nodes(allowed), cpus=usable_cpus())[self.number - 1]
        if place.cpus is not None and sys.platform == "linux":
            os.sched_setaffinity(0, place.cpus)
        return settings.model_copy(update=share | {"threads": settings.threads or place.threads})

    def refuse(self, reason: str) -> None:
        """Tell the supervisor why this worker cannot start."""
        self._tell({"refused": reason})

    def begin(
        self,
        *,
        served: dict[str, object],
        state: Callable[[], State],
        reload: Callable[[], None],
        stop: Callable[[], None],
        take: Callable[[socket.socket], None] = socket.socket.close,
    ) -> None:
        """Tell the supervisor that this worker takes requests, and what is `served`. Call it on the event loop.

        `state` says how the worker is from now on; `reload` reads the keys again; `stop` ends the server in good order;
        `take` gets each connection of another worker to the engine that this one has.
        """
        self._state, self._reload = state, reload

        def look() -> None:
            try:
                message, descriptors, _, _ = socket.recv_fds(self._channel, 1, 1)
            except OSError:  # it was killed, and had not read all
                message, descriptors = b"", []
            for descriptor in descriptors:
                take(socket.socket(fileno=descriptor))
            if message:
                return
            loop.remove_reader(self._channel)
            log.error("the supervisor has ended, and so does this worker")
            stop()

        loop = asyncio.get_running_loop()
        loop.add_reader(self._channel, look)
        self.goes_on()
        self._tell({"ready": served})

    def goes_on(self) -> bool:
        """Tell how this worker is, and do what all workers were told to. False: it cannot go on. Call it often."""
        if self.board.reloads != self._reloads:
            self._reloads = self.board.reloads
            self._reload()
        state = self._state()
        self.board.beat(self.number)
        if state != self.board.state(self.number):
            self.board.set_state(self.number, state)
            if state == State.FAILED:
                log.error("the engine of this worker is dead or stuck: it ends, and another takes its place")
        return state != State.FAILED

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self._channel.sendall(json.dumps(message).encode() + b"\n")
        except OSError as e:
            log.error("the supervisor cannot be told: %s", e)
