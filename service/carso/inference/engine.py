"""The engine: the event loop's door to whatever runs the pipeline's steps, a thread or another process."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol, get_args

from carso.board.whole import Whole
from carso.choices import PathName
from carso.errors import RequestError
from carso.inference.admission import Admission
from carso.inference.jobs import FirstSeen, Job, Kinds, News, Result, Standing, Ticket

STOP_TIMEOUT = 2.0  # seconds; a step takes milliseconds


class EngineError(Exception):
    """The engine failed or was stopped. This job was not finished, and none will be."""


class EngineStopped(EngineError):  # noqa: N818  asked for, not a fault
    """The engine was stopped in good order."""


class EngineDead(EngineError):  # noqa: N818  a state, told to those who come later
    """The engine failed before this job came, and takes no more."""


class Report(NamedTuple):
    """What a runner has done since its last report."""

    news: Iterable[tuple[Ticket, News]]  # of the jobs that are followed
    results: list[tuple[Ticket, Result]]


class Door(NamedTuple):
    """What a runner reports to. `report` and `failed` are called on the event loop."""

    loop: asyncio.AbstractEventLoop
    admission: Mapping[PathName, Admission]  # where what is done is settled
    report: Callable[[Report], None]
    failed: Callable[[BaseException], None]


class Runner(Protocol):
    """Runs jobs, and never on the event loop itself: ``carso.inference.thread.InThread`` or
    ``carso.inference.remote.Remote``.
    """

    progress: float  # when it last got on, or work last came to it while it was idle; clock of time.monotonic

    @property
    def busy(self) -> bool:
        """Whether it works, even if nobody waits for it any more, as far as this process knows."""

    def start(self, door: Door) -> None:
        """Begin to take jobs. Call this on the event loop."""

    def give(self, tickets: list[Ticket]) -> None:
        """Take on jobs, on the event loop."""

    def leave(self, ticket: Ticket) -> None:
        """Note, on the event loop, that nobody waits for a job any more: it is done, or `cancelled`."""

    async def stop(self, timeout: float) -> None:
        """End after the step that it is in, or after `timeout` seconds without."""


class Engine:
    """Runs jobs for one event loop. `admission` holds the work that each path owes."""

    def __init__(
        self, runner: Runner, *, queue_rows: Mapping[PathName, float] | None = None, whole: Whole | None = None
    ) -> None:
        """`queue_rows` are the rows that each path of the `whole` may owe; None: any number, and this process is
        alone.
        """
        limits = queue_rows or {}
        whole = whole or Whole()
        self.admission: dict[PathName, Admission] = {
            path: Admission(limits.get(path, math.inf), whole=whole, path=path) for path in get_args(PathName)
        }
        self._runner = runner
        self._arriving: list[Ticket] = []  # in this turn of the event loop; handed over together at its end
        self._futures: dict[Ticket, asyncio.Future[Result]] = {}  # jobs in flight
        self._followers: dict[Ticket, Callable[[News], None]] = {}  # of those that are followed
        self._finished: deque[tuple[Ticket, Result]] = deque()  # robust answers that wait for their turn
        self._failure: BaseException | None = None
        self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the runner. Call this from the event loop that will run jobs."""
        self._loop = asyncio.get_running_loop()
        self._runner.start(Door(self._loop, self.admission, self._take, self._fail))

    async def stop(self, *, timeout: float = STOP_TIMEOUT) -> None:
        """End the runner after the step it is in; jobs still in flight fail with EngineStopped.

        One that is stuck in a step for longer than `timeout` seconds is left behind, so that the process can exit.
        """
        self._stopped = True
        if self._loop is not None:
            await self._runner.stop(timeout)
            self.abandon()

    def abandon(self) -> None:
        """Fail all jobs in flight with EngineStopped; their elections leave at the next round."""
        self._fail_all(EngineStopped("the service is stopping"))

    @property
    def alive(self) -> bool:
        """Whether the engine takes jobs: until it fails, or is stopped."""
        return self._loop is not None and self._failure is None and not self._stopped

    def stalled(self, seconds: float) -> bool:
        """Whether there is work, even if nobody waits for it any more, and no step has ended for that long."""
        return bool(self._runner.busy or self._futures) and time.monotonic() - self._runner.progress > seconds

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
        if not self._futures and not self._runner.busy:
            self._runner.progress = time.monotonic()
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
            self._runner.leave(ticket)

    def _hand_over(self) -> None:
        self._runner.give(self._arriving)
        self._arriving = []

    def _take(self, report: Report) -> None:
        self._tell(report.news)
        if report.results:
            self._deliver(report.results)

    def _fail(self, failure: BaseException) -> None:
        self._failure = failure
        self._fail_all(EngineError(f"the engine failed: {failure}"))

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
