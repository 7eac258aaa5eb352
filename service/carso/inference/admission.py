"""Admission of work: the rows that one path owes, their limit, and how long to wait when it is reached.

Rows are counted, not requests. A request of 64 images with 10 000 votes each owes 640 064 rows; a fast request of one
image owes one.
"""

from __future__ import annotations

import math

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
    there is no lock.
    """

    def __init__(self, limit: float = math.inf) -> None:
        """`limit`: the most rows that may be owed."""
        self.limit = limit
        self._admitted = 0
        self._settled = 0
        self._recent_rows = 0.0  # both fade with WINDOW
        self._recent_seconds = 0.0

    @property
    def owed(self) -> int:
        """Rows that are owed now."""
        return self._admitted - self._settled

    @property
    def pace(self) -> float:
        """Rows done or spared per second of the engine's work; 0: not measured yet."""
        return self._recent_rows / self._recent_seconds if self._recent_seconds >= MEASURED else 0.0

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
        self.check(rows)
        self._admitted += rows

    def settle(self, rows: int, *, seconds: float) -> None:
        """Note that `rows` are owed no longer, after `seconds` of the engine's work."""
        if not self.owed:
            return
        self._settled += rows
        fade = math.exp(-seconds / WINDOW)
        self._recent_rows = fade * self._recent_rows + rows
        self._recent_seconds = fade * self._recent_seconds + seconds

    def _seconds_for(self, rows: float) -> float:
        pace = self.pace
        return rows / pace if pace else 0.0
