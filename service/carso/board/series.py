"""A worker's counts by name, in memory that the other workers read: each name is followed by its number.

Names are added at the end and never go away. A worker that takes the place of a dead one counts on from its numbers, so
no sum over all workers ever falls.
"""

from __future__ import annotations

from collections.abc import Iterator

from carso.board.memory import Memory

_HEADER = 8  # bytes: how many of the region are in use


class Full(Exception):  # noqa: N818  a state of the region
    """There is no room for another name."""


class Series:
    """The counts of one worker. Only that worker adds names and changes numbers."""

    def __init__(self, memory: Memory, *, start: int, size: int, lock: int) -> None:
        """The region of `size` bytes from `start` on, both multiples of 8. Names are added and found under `lock`."""
        self._memory = memory
        self._lock = lock
        self._start = start
        self._size = size
        self._found: dict[bytes, int] = {}
        self._read = _HEADER  # bytes of the region that were looked at

    def index(self, name: bytes) -> int:
        """Return where among the memory's doubles the number of a name is; it begins at 0. Raises Full."""
        with self._memory.locked(self._lock):
            self._look()
            if name not in self._found:
                end = self._read + 8 + _padded(len(name)) + 8
                if end > self._size:
                    raise Full(f"{self._size} bytes of counts are in use")
                first = self._start + self._read
                self._memory.integers[first // 8] = len(name)
                self._memory.bytes[first + 8 : first + 8 + len(name)] = name
                self._memory.integers[self._start // 8] = end  # from here on it is there
                self._look()
        return self._found[name]

    def numbers(self) -> Iterator[tuple[bytes, float]]:
        """Yield each name with its number."""
        with self._memory.locked(self._lock):
            self._look()
        for name, index in self._found.items():
            yield name, self._memory.doubles[index]

    def _look(self) -> None:
        """Find the names that were added since the last time."""
        used = self._memory.integers[self._start // 8]  # 0 at first
        while self._read < used:
            first = self._start + self._read
            length = self._memory.integers[first // 8]
            self._found[bytes(self._memory.bytes[first + 8 : first + 8 + length])] = (first + 8 + _padded(length)) // 8
            self._read += 8 + _padded(length) + 8


def _padded(length: int) -> int:
    return -(-length // 8) * 8
