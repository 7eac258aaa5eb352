"""API keys: who may use the service, and how much of it."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
from collections.abc import Mapping
from pathlib import Path
from time import monotonic

from carso.board.whole import Cell, Numbers, OwnCell, TooManyNames, Whole
from carso.errors import Overloaded, Unauthorized

SHORTEST = 16  # characters: an attacker guesses as often as requests can be sent
UNNAMED = "unnamed"  # the caller whose keys have no name
SAVED_UP = 10.0  # seconds: the work that a caller who was idle may ask for at once, at its rate
_LINE = re.compile(
    r"(?:(?P<name>[A-Za-z0-9._-]{1,64}): *)?"
    rf"(?P<key>[A-Za-z0-9._~+/=-]{{{SHORTEST},1024}})"
    r"(?: +rate=(?P<rate>[0-9]{1,12}))?"
)
_BEARER = re.compile(rb"bearer +([A-Za-z0-9._~+/=-]{1,1024}) *", re.IGNORECASE)  # what a token may hold (RFC 6750)


class BadKeys(Exception):  # noqa: N818  of the file, not of the program
    """A file of keys cannot be used. The message never shows a key."""


class Caller:
    """Whoever has a key: its name, and the rate at which it may ask for work, in rows per second.

    Rows are saved up for SAVED_UP seconds. A request is let in as long as there are some left, whatever it costs, so
    that the largest one can be sent at any rate; the debt that it leaves has to be paid off before the next.

    What is left is kept in one cell for all workers, and a request is let in and charged in one change of it. So the
    rate holds for the service as a whole, exactly as it does for one process.
    """

    def __init__(self, name: str, rate: int | None, cell: Cell | None = None) -> None:
        """`rate`: None for as much as there is. `cell`: keeps what is left; None: one of this process alone."""
        self.name = name
        self.rate = rate
        self._cell = cell or OwnCell()  # rows left, and at what time, on the clock that all processes share

    def check(self) -> None:
        """Raise Overloaded if this caller has no rows left."""
        self.take(0)

    def take(self, rows: int) -> None:
        """Take `rows`, at least 0, from what is left; it may leave a debt. Raises Overloaded if nothing is left."""
        if self.rate is None:
            return
        rate = self.rate

        def taken(numbers: Numbers) -> Numbers:
            left, at = self._saved_up(numbers, rate)
            if left <= 0:
                wait = max(1, math.ceil(-left / rate))
                raise Overloaded(
                    f"the key of {self.name} is for {rate} rows of work per second, and more were asked for: send this "
                    f"again in {wait} s",
                    retry_after=wait,
                )
            return left - rows, at

        self._cell.change(taken)

    def settle(self, rows: int) -> None:
        """Take `rows` that a request has cost beyond what was taken for it; a negative number gives back."""
        if self.rate is None:
            return
        rate = self.rate

        def settled(numbers: Numbers) -> Numbers:
            left, at = self._saved_up(numbers, rate)
            return left - rows, at

        self._cell.change(settled)

    @staticmethod
    def _saved_up(numbers: Numbers, rate: int) -> tuple[float, float]:
        """Return what is left now."""
        now = monotonic()
        left, at = numbers or (rate * SAVED_UP, now)
        return min(left + (now - at) * rate, rate * SAVED_UP), now


class ApiKeys:
    """The keys that open the service. A caller may have several, so that they can be rotated.

    Only their SHA-256 digests are kept. All are compared, each in constant time, so that the time of a refusal tells
    nothing about any key.
    """

    def __init__(self, path: Path, whole: Whole | None = None) -> None:
        """Read a file with a line `key`, `name: key` or `name: key rate=ROWS` for each key.

        Empty lines and lines that begin with # are skipped. `whole`: the service whose callers they are; None: this
        process alone. Raises BadKeys.
        """
        self._path = path
        self._whole = whole or Whole()
        self._callers = _read(path, self._whole)

    def reload(self) -> None:
        """Read the file again. Raises BadKeys, and goes on with the keys as they were.

        A caller whose name was there before has left what it had left.
        """
        self._callers = _read(self._path, self._whole)

    def check(self, authorization: bytes) -> Caller:
        """Return the caller whose key the header Authorization carries. Raises Unauthorized."""
        given = _BEARER.fullmatch(authorization)
        if given is None:
            raise Unauthorized("this service needs an API key: send it as Authorization: Bearer KEY")
        digest = _digest(given[1])
        found = None
        for known, caller in self._callers.items():
            if hmac.compare_digest(digest, known):
                found = caller
        if found is None:
            raise Unauthorized("this API key is not one of this service's: ask its operator for a valid one")
        return found


def _read(path: Path, whole: Whole) -> Mapping[bytes, Caller]:
    """Return the caller of each key's digest. Raises BadKeys."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise BadKeys(f"{path} cannot be read ({e})") from None
    found: dict[bytes, Caller] = {}
    callers: dict[str, Caller] = {}
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        parts = _LINE.fullmatch(line)
        if parts is None or parts["rate"] == "0":
            raise BadKeys(
                f"line {number} of {path} is not a key: write `name: key`, or `name: key rate=ROWS` with a number of "
                f"rows per second from 1. A key has {SHORTEST} or more of the characters A-Z a-z 0-9 . _ ~ + / = -, as "
                "`openssl rand -base64 32` makes them"
            )
        rate = None if parts["rate"] is None else int(parts["rate"])
        name = parts["name"] or UNNAMED
        if name not in callers:
            callers[name] = Caller(name, rate, None if rate is None else _cell(whole, name, path))
        caller = callers[name]
        if caller.rate != rate:
            raise BadKeys(f"line {number} of {path} gives {caller.name} another rate than a line above: give one")
        digest = _digest(parts["key"].encode())
        if found.setdefault(digest, caller) is not caller:
            raise BadKeys(f"line {number} of {path} has the key of {found[digest].name}: give each caller its own")
    if not found:
        raise BadKeys(f"{path} holds no key: write one a line, or unset this setting to serve without keys")
    return found


def _cell(whole: Whole, name: str, path: Path) -> Cell:
    try:
        return whole.cell(f"rate/{name}")
    except TooManyNames as e:
        raise BadKeys(f"{path} has more callers with a rate than this service can hold ({e}): restart it") from None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
