"""Admission of work: the rows that one path owes, their limit, and how long to wait when it is reached.

Rows are counted, not requests. A request of 64 images with 10 000 votes each owes 640 064 rows; a fast request of one
image owes one. Where the service has workers, the limit is for what all of them owe together.
"""

from __future__ import annotations

import math

from carso.board.whole import State, Whole
from carso.choices import PathName

WINDOW = 5.0  # seconds of work over which the pace is measured
MEASURED = 0.1  # seconds of work before the pace means anything: the first step may be a first pass alone, of one row
PATIENCE = 1.0, 60.0  # seconds: the least and the most that a caller is told to wait


class QueueFull(Exception):  # noqa: N818  a state of the queue, not a fault
    """The work does not fit beside what is owed already. It should fit in `wait` seconds."""

    def __init__(self, message: str, *, wait: float) -> None:
        super().__init__(message)
        self.wait = wait


class Admission:
    """Counts the rows that one path owes: those admitted, and neither done nor dropped yet.

    `admit` belongs to the event loop and `settle` to the engine's thread. Each writes what the other only reads, so
    threads need no lock. Workers do, and so never owe more than the limit together.
    """

    def __init__(self, limit: float = math.inf, *, whole: Whole | None = None, path: PathName = "robust") -> None:
        """`limit`: the most rows that the `whole` may owe on a `path`. None: this process is alone."""
        self.limit = limit
        self._whole = whole or Whole()
        self._admitted, self._settled, self._jobs, self._pace = (
            self._whole.part(f"{path}_{name}") for name in ("admitted", "settled", "jobs", "pace")
        )
        self._recent_rows = 0.0  # both fade with WINDOW
        self._recent_seconds = 0.0

    @property
    def owed(self) -> int:
        """Rows that all workers owe now."""
        return int(sum(self._admitted.each()) - sum(self._settled.each()))

    @property
    def pace(self) -> float:
        """Rows done or spared per second of work, by the engines of all workers; 0: not measured yet.

        A worker that has not measured its own is taken to be as fast as the mean of the others.
        """
        measured = [pace for pace in self._pace.each() if pace]
        running = max(len(measured), 1 + self._whole.others(State.READY))
        return sum(measured) / len(measured) * running if measured else 0.0

    @property
    def jobs(self) -> int:
        """How many jobs the engines of all workers have."""
        return int(sum(self._jobs.each()))

    @property
    def wait(self) -> float:
        """Seconds until what is owed now is done, at the measured pace; 0 while the pace is not known."""
        return self._seconds_for(self.owed)

    def check(self, rows: int) -> None:
        """Raise QueueFull if `rows` more do not fit."""
        excess = self.owed + rows - self.limit
        if excess > 0:
            least, most = PATIENCE
            wait = min(max(self._seconds_for(excess), least), most)
            raise QueueFull(
                f"{self.owed} rows of work are owed to other requests, this one needs {rows} more, and at most "
                f"{self.limit} are allowed: send it again in {math.ceil(wait)} s, to another replica, or with fewer "
                "images or samples",
                wait=wait,
            )

    def admit(self, rows: int) -> None:
        """Take on `rows`. Raises QueueFull."""
        with self._whole.exclusive():
            self.check(rows)
            self._admitted.mine += rows

    def settle(self, rows: int, *, seconds: float) -> None:
        """Note that `rows` are owed no longer, after `seconds` of the engine's work."""
        if self._admitted.mine == self._settled.mine:
            return
        self._settled.mine += rows
        fade = math.exp(-seconds / WINDOW)
        self._recent_rows = fade * self._recent_rows + rows
        self._recent_seconds = fade * self._recent_seconds + seconds
        if self._recent_seconds >= MEASURED:
            self._pace.mine = self._recent_rows / self._recent_seconds

    def settle_all(self, rows: int) -> None:
        """Note, on the event loop, that a job which owed `rows` is over: for engines that do not settle theirs."""
        self._settled.mine += rows

    def tell_pace(self, pace: float) -> None:
        """Take the pace, in rows per second, from an engine that measures it itself; 0: not measured yet."""
        self._pace.mine = pace

    def begin(self) -> None:
        """Count a job that the engine has from now on."""
        self._jobs.mine += 1

    def end(self) -> None:
        """Count it no longer."""
        self._jobs.mine -= 1

    def _seconds_for(self, rows: float) -> float:
        pace = self.pace
        return rows / pace if pace else 0.0
