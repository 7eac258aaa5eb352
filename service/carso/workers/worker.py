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

VARIABLE = "_CARSO_WORKER"  # of the environment: what a process needs to be a worker


class Worker:
    """What the supervisor gave: a number, a seat at the board, the sockets to listen on, and a channel to itself.

    The channel ends with the supervisor. A worker does not outlive it for longer than its requests take.
    """

    def __init__(self, *, number: int, board: int, channel: int, sockets: list[int]) -> None:
        """All but `number` are file descriptors."""
        self.number = number
        self.board = Board(Memory(board))
        self.whole = Seat(self.board, number)
        self.sockets = [socket.socket(fileno=descriptor) for descriptor in sockets]
        self._channel = socket.socket(fileno=channel)
        self._reloads = self.board.reloads  # before the keys are read for the first time
        self._state: Callable[[], State] = lambda: State.LOADING
        self._reload: Callable[[], None] = lambda: None
        self.board.take(number, os.getpid())

    @classmethod
    def here(cls) -> Worker:
        """Return this process as a worker. Raises KeyError if it is none."""
        return cls(**json.loads(os.environ.pop(VARIABLE)))

    def settled(self, settings: Settings) -> Settings:
        """Go to this worker's place among the processors, and return the settings with its share of the threads."""
        allowed = os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)
        place = places(self.board.workers, nodes=usable_nodes(allowed), cpus=usable_cpus())[self.number - 1]
        if place.cpus is not None and sys.platform == "linux":
            os.sched_setaffinity(0, place.cpus)
        return settings.model_copy(
            update={
                "threads": settings.threads or place.threads,
                "decode_threads": max(1, settings.decode_threads // self.board.workers),
            }
        )

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
    ) -> None:
        """Tell the supervisor that this worker takes requests, and what is `served`. Call it on the event loop.

        `state` says how the worker is from now on; `reload` reads the keys again; `stop` ends the server in good order.
        """
        self._state, self._reload = state, reload

        def gone() -> None:
            loop.remove_reader(self._channel)
            log.error("the supervisor has ended, and so does this worker")
            stop()

        loop = asyncio.get_running_loop()
        loop.add_reader(self._channel, gone)
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
