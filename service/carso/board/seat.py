"""The board of a service with workers: one piece of memory, in which each worker has a seat.

    head | a seat for each worker: its state and its parts | cells by name | the counts of each worker

The supervisor makes it, and gives a seat to each worker that it starts. When one dies, its seat is cleared and its
place taken. Its counts stay, and so do the cells.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import IntEnum

from carso.board.memory import Memory
from carso.board.series import Series
from carso.board.whole import PARTS, Cell, Numbers, State, TooManyNames, Whole

MOST_CELLS = 8192
CELL_NUMBERS = 15  # the most numbers that a cell has
NAME_BYTES = 112  # the longest name of a cell
_HEAD_BYTES = 512
_SEAT_BYTES = 512
# its name; which of two halves holds (0: it is free); each half with the count of its numbers first
_CELL_BYTES = NAME_BYTES + 8 + 2 * 8 * (1 + CELL_NUMBERS)
_SERIES_BYTES = 8 * 2**20  # only what is written to takes memory
_STATE, _PROCESS, _BEAT, _FIRST_PART = 0, 1, 2, 3  # places in a seat, in numbers of 8 bytes


class _Head(IntEnum):
    """Places in the head, in numbers of 8 bytes."""

    WORKERS = 0
    DRAINING = 1
    RELOADS = 2
    RESTARTS = 3
    SUPERVISOR = 4
    CPU_OF_THE_DEAD = 5


class Lock(IntEnum):
    """What is done by one process at a time."""

    NUMBERS = 0
    LOG = 1


class Board:
    """The board, as the supervisor sees it. Workers are numbered from 1.

    The last seat is for the process of an engine that all workers share. It is none of the `workers`.
    """

    def __init__(self, memory: Memory) -> None:
        """Use a board that is there."""
        self.memory = memory
        self.workers = memory.integers[_Head.WORKERS]
        self.engine = self.workers + 1
        self._cells_at = _HEAD_BYTES + self.engine * _SEAT_BYTES
        series_at = self._cells_at + MOST_CELLS * _CELL_BYTES
        self.series = [
            Series(memory, start=series_at + worker * _SERIES_BYTES, size=_SERIES_BYTES, lock=Lock.NUMBERS)
            for worker in range(self.engine)
        ]
        self._places: dict[bytes, int] = {}

    @classmethod
    def create(cls, *, workers: int, supervisor: int) -> Board:
        """Make a board. `supervisor`: the id of its process."""
        size = _HEAD_BYTES + (workers + 1) * (_SEAT_BYTES + _SERIES_BYTES) + MOST_CELLS * _CELL_BYTES
        memory = Memory.create(size)
        memory.integers[_Head.WORKERS] = workers
        memory.integers[_Head.SUPERVISOR] = supervisor
        return cls(memory)

    @property
    def draining(self) -> bool:
        """Whether all workers were told to stop."""
        return bool(self.memory.integers[_Head.DRAINING])

    def drain(self) -> None:
        """Say that all workers are told to stop."""
        self.memory.integers[_Head.DRAINING] = 1

    @property
    def reloads(self) -> int:
        """How often the workers were told to read their keys again."""
        return self.memory.integers[_Head.RELOADS]

    def reload(self) -> None:
        """Say that the workers are told to read their keys again."""
        self.memory.integers[_Head.RELOADS] += 1

    @property
    def restarts(self) -> int:
        """How many workers took the place of one that ended."""
        return self.memory.integers[_Head.RESTARTS]

    @property
    def cpu_of_the_dead(self) -> float:
        """Processor seconds of the workers that ended."""
        return self.memory.doubles[_Head.CPU_OF_THE_DEAD]

    def state(self, worker: int) -> State:
        """Return what a worker is doing."""
        return State(self._seat(worker, _STATE))

    def states(self) -> list[State]:
        """Return what each worker is doing."""
        return [self.state(worker) for worker in range(1, self.workers + 1)]

    def set_state(self, worker: int, state: State) -> None:
        """Say what a worker is doing."""
        self.memory.integers[self._at(worker, _STATE)] = state

    def processes(self) -> list[int]:
        """Return the ids of the processes of the service that are there."""
        ids = [self._seat(worker, _PROCESS) for worker in range(1, self.engine + 1)]
        return [self.memory.integers[_Head.SUPERVISOR], *filter(None, ids)]

    def beat(self, worker: int) -> None:
        """Say that the event loop of a worker turns."""
        self.memory.doubles[self._at(worker, _BEAT)] = time.monotonic()

    def silence(self, worker: int) -> float:
        """Return for how many seconds the event loop of a worker did not turn."""
        return time.monotonic() - self.memory.doubles[self._at(worker, _BEAT)]

    def take(self, worker: int, process: int) -> None:
        """Give the seat of a worker to a process, which loads from now on."""
        self.memory.integers[self._at(worker, _PROCESS)] = process
        self.beat(worker)
        self.set_state(worker, State.LOADING)

    def clear(self, worker: int, *, cpu: float, replaced: bool) -> None:
        """Take note that a worker has ended, after `cpu` processor seconds; nothing is owed by it any longer.

        `replaced`: whether another will take its place.
        """
        self.set_state(worker, State.DEAD)
        for place in range(_PROCESS, _FIRST_PART + len(PARTS)):
            self.memory.integers[self._at(worker, place)] = 0
        self.memory.doubles[_Head.CPU_OF_THE_DEAD] += cpu
        self.memory.integers[_Head.RESTARTS] += replaced

    def part(self, worker: int, name: str) -> float:
        """Return a worker's part of a number."""
        return self.memory.doubles[self._part_at(worker, name)]

    def set_part(self, worker: int, name: str, value: float) -> None:
        """Set a worker's part of a number."""
        self.memory.doubles[self._part_at(worker, name)] = value

    def cell(self, name: str) -> Cell:
        """Return the cell of a name, which is made at the first call. Raises TooManyNames, and ValueError if the name
        is too long.
        """
        encoded = name.encode()
        if not 0 < len(encoded) <= NAME_BYTES:
            raise ValueError(f"the name of a cell has 1 to {NAME_BYTES} bytes, and {name!r} has {len(encoded)}")
        with self.memory.locked(Lock.NUMBERS):
            self._look()
            if encoded not in self._places:
                if len(self._places) == MOST_CELLS:
                    raise TooManyNames(f"{MOST_CELLS} names are known already")
                first = self._cells_at + len(self._places) * _CELL_BYTES
                self.memory.bytes[first + 1 : first + NAME_BYTES] = encoded[1:].ljust(NAME_BYTES - 1, b"\0")
                self.memory.bytes[first] = encoded[0]  # from here on it is there
                self._look()
        return _SharedCell(self.memory, self._places[encoded])

    def cells(self, prefix: str) -> dict[str, Cell]:
        """Return the cells whose names begin so, by the rest of their names."""
        with self.memory.locked(Lock.NUMBERS):
            self._look()
        return {
            name.decode().removeprefix(prefix): _SharedCell(self.memory, place)
            for name, place in self._places.items()
            if name.startswith(prefix.encode())
        }

    def log_lock(self) -> AbstractContextManager[None]:
        """Keep the other processes from writing to the log."""
        return self.memory.locked(Lock.LOG)

    def _look(self) -> None:
        """Find the cells that were made since the last time."""
        while len(self._places) < MOST_CELLS:
            first = self._cells_at + len(self._places) * _CELL_BYTES
            name = bytes(self.memory.bytes[first : first + NAME_BYTES]).rstrip(b"\0")
            if not self.memory.bytes[first]:
                break
            self._places[name] = first + NAME_BYTES

    def _at(self, worker: int, place: int) -> int:
        return (_HEAD_BYTES + (worker - 1) * _SEAT_BYTES) // 8 + place

    def _seat(self, worker: int, place: int) -> int:
        return self.memory.integers[self._at(worker, place)]

    def _part_at(self, worker: int, name: str) -> int:
        return self._at(worker, _FIRST_PART + _PLACES[name])


_PLACES = {name: place for place, name in enumerate(PARTS)}


class Seat(Whole):
    """The whole service, as one of its workers sees it."""

    def __init__(self, board: Board, number: int) -> None:
        """`number`: of this worker, from 1."""
        self.board = board
        self.number = number
        self.workers = board.workers
        self._shared = {name: _SharedPart(board, number, name) for name in PARTS}

    @property
    def draining(self) -> bool:
        """As Whole."""
        return self.board.draining

    def others(self, state: State) -> int:
        """As Whole."""
        return sum(self.board.state(worker) == state for worker in range(1, self.workers + 1) if worker != self.number)

    def part(self, name: str) -> _SharedPart:
        """As Whole."""
        return self._shared[name]

    def cell(self, name: str) -> Cell:
        """As Whole. Raises TooManyNames."""
        return self.board.cell(name)

    def cells(self, prefix: str) -> dict[str, Cell]:
        """As Whole."""
        return self.board.cells(prefix)

    def exclusive(self) -> AbstractContextManager[None]:
        """As Whole."""
        return self.board.memory.locked(Lock.NUMBERS)


class _SharedPart:
    def __init__(self, board: Board, worker: int, name: str) -> None:
        self._doubles = board.memory.doubles
        self._mine = board._part_at(worker, name)
        self._each = [board._part_at(other, name) for other in range(1, board.engine + 1)]

    @property
    def mine(self) -> float:
        return self._doubles[self._mine]

    @mine.setter
    def mine(self, value: float) -> None:
        self._doubles[self._mine] = value

    def each(self) -> list[float]:
        return [self._doubles[place] for place in self._each]


class _SharedCell:
    """Which half holds is written last, so that a worker that is killed meanwhile leaves the numbers as they were."""

    def __init__(self, memory: Memory, first: int) -> None:
        self._memory = memory
        self._half = first // 8
        self._halves = tuple(self._half + 1 + half * (1 + CELL_NUMBERS) for half in range(2))

    def read(self) -> Numbers:
        with self._memory.locked(Lock.NUMBERS):
            return self._numbers()

    def change(self, update: Callable[[Numbers], Numbers]) -> Numbers:
        with self._memory.locked(Lock.NUMBERS):
            numbers = update(self._numbers())
            half = 1 if self._memory.integers[self._half] != 1 else 2
            first = self._halves[half - 1]
            self._memory.integers[first] = len(numbers)
            for place, number in enumerate(numbers, first + 1):
                self._memory.doubles[place] = number
            self._memory.integers[self._half] = half
            return numbers

    def _numbers(self) -> Numbers:
        half = self._memory.integers[self._half]
        if not half:
            return ()
        first = self._halves[half - 1]
        count = self._memory.integers[first]
        return tuple(self._memory.doubles[first + 1 : first + 1 + count])
