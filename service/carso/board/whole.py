"""The service as a whole, as one of its processes sees it. Here it is that process alone; ``carso.board.seat`` is the
same for a service with workers.

Two kinds of numbers make up the whole. A *part* is written by its worker only, and the whole is the sum of all parts.
A *cell* is one for all, and is changed by one worker at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum
from typing import Protocol

Numbers = tuple[float, ...]

# Every number of which each worker has a part, and so has the process of a shared engine. Those that count rows and
# jobs are there for each path.
PARTS = (
    *(f"{path}_{name}" for path in ("fast", "robust") for name in ("admitted", "settled", "jobs", "pace")),
    "bodies",  # bytes of bodies in flight
    "canary_asked",
    "canary_right",
    "streams",  # that are open
)


class State(IntEnum):
    """What a worker is doing."""

    DEAD = 0  # it ended, or never began
    LOADING = 1
    READY = 2
    DRAINING = 3  # it was told to stop
    FAILED = 4  # its engine is dead or stuck; it ends


class TooManyNames(Exception):  # noqa: N818  a state of the board
    """No cell is left for another name."""


class Part(Protocol):
    """A number of which every worker has a part. Only one thread of a worker changes its own."""

    mine: float

    def each(self) -> list[float]:
        """Return the parts of all workers, and last that of the process of an engine which they share."""


class Cell(Protocol):
    """A few numbers that are one for all workers."""

    def read(self) -> Numbers:
        """Return them; () before the first change."""

    def change(self, update: Callable[[Numbers], Numbers]) -> Numbers:
        """Replace them by what `update` makes of them, and return that. Nobody else changes them meanwhile.

        For use on the event loop only. `update` must not use another cell.
        """


class Whole:
    """A service that is one process."""

    number = 1  # of this worker, from 1
    workers = 1

    def __init__(self) -> None:
        self._parts: dict[str, _OwnPart] = {name: _OwnPart() for name in PARTS}
        self._cells: dict[str, Cell] = {}

    @property
    def draining(self) -> bool:
        """Whether all workers were told to stop."""
        return False

    def others(self, state: State) -> int:
        """Count the other workers in a state."""
        return 0

    def part(self, name: str) -> Part:
        """Return one of PARTS."""
        return self._parts[name]

    def cell(self, name: str) -> Cell:
        """Return the cell of a name, which is made at the first call. Raises TooManyNames."""
        return self._cells.setdefault(name, OwnCell())

    def cells(self, prefix: str) -> dict[str, Cell]:
        """Return the cells whose names begin so, by the rest of their names."""
        return {name.removeprefix(prefix): cell for name, cell in self._cells.items() if name.startswith(prefix)}

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep the other workers from changing what is looked at. For use on the event loop only; it does not nest."""
        return _NOBODY


class OwnCell:
    """A cell of this process alone."""

    def __init__(self) -> None:
        self._numbers: Numbers = ()

    def read(self) -> Numbers:
        """As Cell."""
        return self._numbers

    def change(self, update: Callable[[Numbers], Numbers]) -> Numbers:
        """As Cell."""
        self._numbers = update(self._numbers)
        return self._numbers


class _OwnPart:
    def __init__(self) -> None:
        self.mine: float = 0

    def each(self) -> list[float]:
        return [self.mine]


_NOBODY = nullcontext()  # there is nobody else
