"""The thread that owns the sessions and runs the pipeline's steps."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

from carso.inference.engine import Door, Report
from carso.inference.jobs import Step, Ticket
from carso.inference.one_thread import OneThread

log = logging.getLogger(__name__)

T = TypeVar("T")


class Steps(Protocol):
    """What the thread runs: the methods of ``carso.inference.pipeline.Pipeline``."""

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""

    def admit(self, tickets: Iterable[Ticket]) -> None:
        """Take on jobs."""

    def first_passes(self) -> Step:
        """Compute a batch of first passes."""

    def round(self) -> Step:
        """Cast one round of votes."""


class InThread:
    """Runs the steps of a pipeline in a thread of this process: a Runner, as ``carso.inference.engine`` has it."""

    def __init__(
        self,
        pipeline: Steps,
        *,
        thread: OneThread | None = None,
        observe: Callable[[Step], None] = lambda step: None,
    ) -> None:
        """`thread`: the one in which the pipeline's sessions were built; None: they may run in any, so a new one.
        `observe` is called with every step, on the thread: keep it short.
        """
        self.progress = 0.0
        self.busy = False  # the thread is in a step, or between two
        self._pipeline = pipeline
        self._observe = observe
        self._arrivals: SimpleQueue[list[Ticket] | None] = SimpleQueue()  # None: stop
        self._thread = thread or OneThread()

    def start(self, door: Door) -> None:
        """As Runner."""
        self._door = door
        self._thread.submit(self._run)

    def give(self, tickets: list[Ticket]) -> None:
        """As Runner."""
        self._arrivals.put(tickets)

    def leave(self, ticket: Ticket) -> None:
        """As Runner: the thread sees for itself that a ticket is cancelled."""

    async def stop(self, timeout: float) -> None:
        """As Runner."""
        self._arrivals.put(None)
        if not await asyncio.to_thread(self._thread.end, timeout):
            log.error("the engine has been in one step for %g s, and is left behind", timeout)

    def _run(self) -> None:
        try:
            while self._take_arrivals():
                self.busy = True
                for work in (self._pipeline.first_passes, self._pipeline.round):
                    step = work()
                    self.progress = time.monotonic()
                    for path, admission in self._door.admission.items():
                        admission.settle(step.settled.get(path, 0), seconds=step.seconds)
                    self._observe(step)
                    results = [(ticket, result) for ticket, result in step.finished if result is not None]
                    if results or step.news:  # the fast path's answers leave before the round
                        self._call(self._door.report, Report(step.news, results))
                self.busy = self._pipeline.busy
        except BaseException as e:
            log.exception("the engine thread failed")
            self._call(self._door.failed, e)

    def _take_arrivals(self) -> bool:
        """Admit what has arrived, after waiting for it if there is nothing else to do. False: stop."""
        arrivals: list[Ticket] = []
        try:
            while True:
                idle = not self._pipeline.busy and not arrivals
                tickets = self._arrivals.get(block=idle)
                if tickets is None:
                    return False
                arrivals += tickets
        except Empty:
            self._pipeline.admit(arrivals)
            return True

    def _call(self, function: Callable[[T], None], argument: T) -> None:
        try:
            self._door.loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            log.warning("the event loop ended before the engine")
