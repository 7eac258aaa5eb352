"""The engine: one thread that owns the sessions and runs the pipeline's rounds, and the event loop's door to it."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from typing import get_args

from service.admission import Admission
from service.pipeline import Job, Path, Pipeline, Step

log = logging.getLogger(__name__)


class EngineError(Exception):
    """The engine's thread has failed or was stopped; this job was not finished, and none will be."""


class EngineStopped(EngineError):  # noqa: N818  asked for, not a fault
    """It was stopped in good order."""


class Engine:
    """Runs jobs for one event loop."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        observe: Callable[[Step], None] = lambda step: None,
        queue_rows: Mapping[Path, float] | None = None,
    ) -> None:
        """`observe` is called with every step, on the engine's thread: keep it short. `queue_rows`: the rows that each
        path may owe; default: any number."""
        limits = queue_rows or {}
        self.admission: dict[Path, Admission] = {path: Admission(limits.get(path, math.inf)) for path in get_args(Path)}
        self._pipeline = pipeline
        self._observe = observe
        self._arriving: list[Job] = []  # in this turn of the event loop; handed over together at its end
        self._arrivals: SimpleQueue[list[Job] | None] = SimpleQueue()  # None: stop
        self._futures: dict[Job, asyncio.Future[None]] = {}  # jobs in flight; touched by the event loop only
        self._failure: BaseException | None = None
        self._stopped = False
        self._working_since: float | None = None  # on the clock of time.monotonic; None: nothing to do
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="carso-engine", daemon=True)

    def start(self) -> None:
        """Start the thread; call from the event loop that will run jobs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after the round it is in; jobs still in flight fail with EngineStopped."""
        self._stopped = True
        if self._thread.ident is None:
            return
        self._arrivals.put(None)
        await asyncio.to_thread(self._thread.join)
        self.abandon()

    def abandon(self) -> None:
        """Fail all jobs in flight with EngineStopped; their elections leave at the next round."""
        self._fail_all(EngineStopped("the service is stopping"))

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._failure is None and not self._stopped

    def stalled(self, seconds: float) -> bool:
        """Whether the thread has been in one step for longer than that."""
        since = self._working_since
        return since is not None and time.monotonic() - since > seconds

    @property
    def in_flight(self) -> int:
        """Jobs."""
        return len(self._futures)

    def in_flight_on(self, path: Path) -> int:
        """Jobs of one path."""
        return sum(job.path == path for job in self._futures)

    async def run(self, job: Job) -> Job:
        """Give `job` to the pipeline and return it finished.

        If the awaiting task is cancelled, the job's elections leave at the next round. Raises EngineError,
        QueueFull.
        """
        if not self.alive or self._loop is None:
            kind = EngineStopped if self._stopped else EngineError
            raise kind(f"the engine is not running: {self._failure or 'stopped'}")
        self.admission[job.path].admit(job.rows)
        future = self._futures[job] = self._loop.create_future()
        if not self._arriving:
            self._loop.call_soon(self._hand_over)  # one wake-up of the engine for all that this turn brings
        self._arriving.append(job)
        try:
            await future
        finally:
            job.cancelled = not future.done() or future.cancelled()
            self._futures.pop(job, None)
        return job

    def _hand_over(self) -> None:
        self._arrivals.put(self._arriving)
        self._arriving = []

    def _run(self) -> None:
        try:
            while self._take_arrivals():
                for work in (self._pipeline.first_passes, self._pipeline.round):
                    self._working_since = time.monotonic()
                    step = work()
                    for path, admission in self.admission.items():
                        admission.settle(step.settled[path], seconds=step.seconds)
                    self._observe(step)
                    if step.finished:  # the fast path's answers leave before the round
                        self._call(self._resolve, step.finished)
                self._working_since = None
        except BaseException as e:
            log.exception("the engine thread failed")
            self._failure = e
            self._call(self._fail_all, EngineError(f"the engine thread failed: {e}"))

    def _take_arrivals(self) -> bool:
        """Admit what has arrived, after waiting for it if there is nothing else to do. False: stop."""
        arrivals: list[Job] = []
        try:
            while True:
                idle = not self._pipeline.busy and not arrivals
                jobs = self._arrivals.get(block=idle)
                if jobs is None:
                    return False
                arrivals += jobs
        except Empty:
            self._pipeline.admit(arrivals)
            return True

    def _call(self, function: Callable[..., None], argument: object) -> None:
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            log.warning("the event loop ended before the engine")

    def _resolve(self, jobs: list[Job]) -> None:
        for job in jobs:
            future = self._futures.get(job)
            if future is not None and not future.done():
                future.set_result(None)

    def _fail_all(self, error: EngineError) -> None:
        for future in self._futures.values():
            if not future.done():
                future.set_exception(error)
