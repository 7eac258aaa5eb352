"""A thread for what has to stay in one thread: an engine's sessions, from when they are built to their last run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar
from weakref import finalize

from carso.inference.processors import give_way

T = TypeVar("T")
_Queue = SimpleQueue[Callable[[], None] | None]  # None: end


class OneThread:
    """Runs one function after another, in a thread that gives way to the rest of the process.

    The thread ends by `end`, or when nobody has this object any more, and does not keep the process from its end.
    Threads that a function starts, such as ONNX Runtime's own, give way too.
    """

    def __init__(self) -> None:
        """Start the thread."""
        self._given: _Queue = SimpleQueue()
        self._thread = Thread(target=_run, args=(self._given,), name="carso-engine", daemon=True)
        self._thread.start()
        finalize(self, self._given.put, None)

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` after those that came before it. The future has what it returns or raises."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as e:
                future.set_exception(e)

        self._given.put(run)
        return future

    def end(self, timeout: float) -> bool:
        """End after the functions that are there, and wait up to `timeout` seconds. Return whether it has ended."""
        self._given.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()


def _run(given: _Queue) -> None:
    give_way()
    while (function := given.get()) is not None:
        function()
        del function  # what it holds may go
