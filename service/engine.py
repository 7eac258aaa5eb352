"""The engine: one thread that owns the sessions and runs the pipeline's rounds, and the event loop's door to it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from service.pipeline import Job, Pipeline, Step

log = logging.getLogger(__name__)


class EngineError(Exception):
    """The engine's thread has failed or was stopped; this job was not finished, and none will be."""


class Engine:
    """Runs jobs for one event loop. `observe` is called with every step, on the engine's thread: keep it short."""

    def __init__(self, pipeline: Pipeline, *, observe: Callable[[Step], None] = lambda step: None) -> None:
        self._pipeline = pipeline
        self._observe = observe
        self._arriving: list[Job] = []  # in this turn of the event loop; handed over together at its end
        self._arrivals: SimpleQueue[list[Job] | None] = SimpleQueue()  # None: stop
        self._futures: dict[Job, asyncio.Future[None]] = {}  # jobs in flight; touched by the event loop only
        self._failure: BaseException | None = None
        self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="carso-engine", daemon=True)

    def start(self) -> None:
        """Start the thread; call from the event loop that will run jobs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after the round it is in; jobs still in flight fail with EngineError."""
        self._stopped = True
        if self._thread.ident is None:
            return
        self._arrivals.put(None)
        await asyncio.to_thread(self._thread.join)
        self._fail_all(EngineError("the service is stopping"))

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._failure is None and not self._stopped

    @property
    def in_flight(self) -> int:
        """Jobs."""
        return len(self._futures)

    async def run(self, job: Job) -> Job:
        """Give `job` to the pipeline and return it finished.

        If the awaiting task is cancelled, the job's elections leave at the next round. Raises EngineError.
        """
        if not self.alive or self._loop is None:
            raise EngineError(f"the engine is not running: {self._failure or 'stopped'}")
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
                    step = work()
                    self._observe(step)
                    if step.finished:  # the fast path's answers leave before the round
                        self._call(self._resolve, step.finished)
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
