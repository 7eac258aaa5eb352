"""The engine: one thread that owns the sessions and runs the pipeline's steps, and the event loop's door to it."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from queue import Empty, SimpleQueue
from typing import Protocol, get_args

from carso.board.whole import Whole
from carso.choices import PathName
from carso.errors import RequestError
from carso.inference.admission import Admission
from carso.inference.jobs import FirstSeen, Job, Kinds, News, Result, Standing, Step, Ticket
from carso.inference.processors import give_way

log = logging.getLogger(__name__)

STOP_TIMEOUT = 2.0  # seconds; a step takes milliseconds


class EngineError(Exception):
    """The engine's thread failed or was stopped. This job was not finished, and none will be."""


class EngineStopped(EngineError):  # noqa: N818  asked for, not a fault
    """The engine was stopped in good order."""


class EngineDead(EngineError):  # noqa: N818  a state, told to those who come later
    """The engine failed before this job came, and takes no more."""


class Steps(Protocol):
    """What the engine runs: the methods of ``carso.inference.pipeline.Pipeline``."""

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""

    def admit(self, tickets: Iterable[Ticket]) -> None:
        """Take on jobs."""

    def first_passes(self) -> Step:
        """Compute a batch of first passes."""

    def round(self) -> Step:
        """Cast one round of votes."""


class Engine:
    """Runs jobs for one event loop. `admission` holds the work that each path owes."""

    def __init__(
        self,
        pipeline: Steps,
        *,
        observe: Callable[[Step], None] = lambda step: None,
        queue_rows: Mapping[PathName, float] | None = None,
        whole: Whole | None = None,
    ) -> None:
        """`observe` is called with every step, on the engine's thread: keep it short. `queue_rows` are the rows that
        each path of the `whole` may owe; None: any number, and this process is alone.
        """
        limits = queue_rows or {}
        whole = whole or Whole()
        self.admission: dict[PathName, Admission] = {
            path: Admission(limits.get(path, math.inf), whole=whole, path=path) for path in get_args(PathName)
        }
        self._pipeline = pipeline
        self._observe = observe
        self._arriving: list[Ticket] = []  # in this turn of the event loop; handed over together at its end
        self._arrivals: SimpleQueue[list[Ticket] | None] = SimpleQueue()  # None: stop
        self._futures: dict[Ticket, asyncio.Future[Result]] = {}  # jobs in flight; touched by the event loop only
        self._followers: dict[Ticket, Callable[[News], None]] = {}  # of those that are followed; likewise
        self._finished: deque[tuple[Ticket, Result]] = deque()  # robust answers that wait for their turn; likewise
        self._failure: BaseException | None = None
        self._stopped = False
        self._busy = False  # the thread is in a step, or between two
        self._progress = 0.0  # when a step last ended, or work last came to an idle engine; clock of time.monotonic
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="carso-engine", daemon=True)

    def start(self) -> None:
        """Start the thread. Call this from the event loop that will run jobs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self, *, timeout: float = STOP_TIMEOUT) -> None:
        """End the thread after the step it is in; jobs still in flight fail with EngineStopped.

        A thread that is stuck in a step for longer than `timeout` seconds is left behind, so that the process can exit.
        """
        self._stopped = True
        if self._thread.ident is None:
            return
        self._arrivals.put(None)
        await asyncio.to_thread(self._thread.join, timeout)
        if self._thread.is_alive():
            log.error("the engine has been in one step for %g s, and is left behind", timeout)
        self.abandon()

    def abandon(self) -> None:
        """Fail all jobs in flight with EngineStopped; their elections leave at the next round."""
        self._fail_all(EngineStopped("the service is stopping"))

    @property
    def alive(self) -> bool:
        """Whether the engine takes jobs. Its thread ends by a failure or by `stop`."""
        return self._loop is not None and self._failure is None and not self._stopped

    def stalled(self, seconds: float) -> bool:
        """Whether there is work, even if nobody waits for it any more, and no step has ended for that long."""
        return bool(self._busy or self._futures) and time.monotonic() - self._progress > seconds

    @property
    def in_flight(self) -> int:
        """How many jobs the engine has."""
        return len(self._futures)

    async def run(
        self, job: Job, *, follow: Callable[[News], None] | None = None, kinds: Kinds = (FirstSeen, Standing)
    ) -> Result:
        """Give `job` to the pipeline and return its result. `follow` is called on the event loop, with what each step
        has to tell of the job before it is done, as far as that is of one of these `kinds`: keep it short. If it raises
        a RequestError, that is the end of the job.

        If the awaiting task is cancelled, the job's elections leave at the next round. Raises QueueFull, EngineStopped,
        EngineDead, EngineError if the engine fails meanwhile, and what `follow` raises.
        """
        if not self.alive or self._loop is None:
            kind = EngineDead if self._failure else EngineStopped
            raise kind(f"the engine is not running: {self._failure or 'stopped'}")
        self.admission[job.path].admit(job.rows)
        if not self._futures and not self._busy:
            self._progress = time.monotonic()
        ticket = Ticket(job, followed=() if follow is None else kinds)
        if follow is not None:
            self._followers[ticket] = follow
        future: asyncio.Future[Result] = self._loop.create_future()
        self._futures[ticket] = future
        self.admission[job.path].begin()
        if not self._arriving:
            self._loop.call_soon(self._hand_over)  # one wake-up of the engine for all that this turn brings
        self._arriving.append(ticket)
        try:
            return await future
        finally:
            ticket.cancelled = True  # whatever is not done by now is for nobody
            self._futures.pop(ticket, None)
            self.admission[job.path].end()
            self._followers.pop(ticket, None)

    def _hand_over(self) -> None:
        self._arrivals.put(self._arriving)
        self._arriving = []

    def _run(self) -> None:
        try:
            give_way()
            while self._take_arrivals():
                self._busy = True
                for work in (self._pipeline.first_passes, self._pipeline.round):
                    step = work()
                    self._progress = time.monotonic()
                    for path, admission in self.admission.items():
                        admission.settle(step.settled.get(path, 0), seconds=step.seconds)
                    self._observe(step)
                    if step.news:
                        self._call(self._tell, step.news)
                    results = [(ticket, result) for ticket, result in step.finished if result is not None]
                    if results:  # the fast path's answers leave before the round
                        self._call(self._deliver, results)
                self._busy = self._pipeline.busy
        except BaseException as e:
            self._failure = e
            log.exception("the engine thread failed")
            self._call(self._fail_all, EngineError(f"the engine thread failed: {e}"))

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

    def _call(self, function: Callable[..., None], argument: object) -> None:
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            log.warning("the event loop ended before the engine")

    def _tell(self, news: Iterable[tuple[Ticket, News]]) -> None:
        for ticket, found in news:
            follow, future = self._followers.get(ticket), self._futures.get(ticket)
            if follow is None or future is None or future.done():
                continue
            try:
                follow(found)
            except RequestError as e:
                ticket.cancelled = True
                future.set_exception(e)

    def _deliver(self, results: list[tuple[Ticket, Result]]) -> None:
        """Give fast answers at once; and robust ones, of which a round may end many, one in each turn of the loop.

        Otherwise the requests that arrive meanwhile would wait until all of them are written.
        """
        idle = not self._finished
        for ticket, result in results:
            if ticket.job.path == "fast":
                self._resolve(ticket, result)
            else:
                self._finished.append((ticket, result))
        if idle and self._finished:
            self._deliver_next()

    def _deliver_next(self) -> None:
        if self._finished:  # else they went with a stop
            self._resolve(*self._finished.popleft())
        if self._finished and self._loop is not None:
            self._loop.call_soon(self._deliver_next)

    def _resolve(self, ticket: Ticket, result: Result) -> None:
        future = self._futures.get(ticket)
        if future is not None and not future.done():
            future.set_result(result)

    def _fail_all(self, error: EngineError) -> None:
        while self._finished:
            self._resolve(*self._finished.popleft())
        for ticket, future in self._futures.items():
            if not future.done():
                ticket.cancelled = True
                future.set_exception(error)
