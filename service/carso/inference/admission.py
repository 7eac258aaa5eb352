"""Who is let in: the rows of work that one path owes, its limit, and how long to stay away when it is full.

Rows, not requests: a request of 64 images and 10 000 votes each owes 640 064 of them, a fast one of one image owes one.
"""

from __future__ import annotations

import math

WINDOW = 5.0  # seconds of work over which the pace is measured
MEASURED = 0.1  # seconds of work that say something of it: the very first step may be a first pass alone, of one row
PATIENCE = 1.0, 60.0  # seconds: the least and the most that a caller is told to wait


class QueueFull(Exception):  # noqa: N818  a state of the queue, not a fault
    """The work does not fit beside what is owed already; it should in `wait` seconds."""

    def __init__(self, message: str, *, wait: float) -> None:
        super().__init__(message)
        self.wait = wait


class Admission:
    """Rows owed by one path: admitted, and neither done nor dropped yet.

    `admit` belongs to the event loop and `settle` to the engine's thread: each writes what the other only reads, so
    there is no lock.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.limit = limit
        self._admitted = 0
        self._settled = 0
        self._recent_rows = 0.0  # both fade with WINDOW
        self._recent_seconds = 0.0

    @property
    def owed(self) -> int:
        return self._admitted - self._settled

    @property
    def pace(self) -> float:
        """Rows per second of work, cast or spared by early stopping; 0: not measured yet."""
        return self._recent_rows / self._recent_seconds if self._recent_seconds >= MEASURED else 0.0

    @property
    def wait(self) -> float:
        """Seconds until what is owed now is done, at the measured pace; 0 while there is none."""
        return self._seconds_for(self.owed)

    def check(self, rows: int) -> None:
        """Raise QueueFull if `rows` more would not fit."""
        excess = self.owed + rows - self.limit
        if excess > 0:
            least, most = PATIENCE
            wait = min(max(self._seconds_for(excess), least), most)
            raise QueueFull(
                f"{self.owed} rows of work are owed to other requests, this one needs {rows} more, and at most "
                f"{self.limit} are taken: send it again in {math.ceil(wait)} s, to another replica, or with fewer "
                "images or samples",
                wait=wait,
            )

    def admit(self, rows: int) -> None:
        """Raises QueueFull."""
        self.check(rows)
        self._admitted += rows

    def settle(self, rows: int, *, seconds: float) -> None:
        """`rows` are owed no longer, after so many seconds of the engine's work."""
        if not self.owed:
            return
        self._settled += rows
        fade = math.exp(-seconds / WINDOW)
        self._recent_rows = fade * self._recent_rows + rows
        self._recent_seconds = fade * self._recent_seconds + seconds

    def _seconds_for(self, rows: float) -> float:
        pace = self.pace
        return rows / pace if pace else 0.0
