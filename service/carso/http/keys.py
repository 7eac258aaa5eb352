"""API keys: who may use the service."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from carso.errors import Unauthorized

SHORTEST = 16  # characters: an attacker guesses as often as requests can be sent
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")  # what a bearer token may hold (RFC 6750)
_BEARER = re.compile(rb"bearer +([A-Za-z0-9._~+/=-]{1,1024}) *", re.IGNORECASE)


class BadKeys(Exception):  # noqa: N818  of the file, not of the program
    """A file of keys cannot be used. The message never shows a key."""


class ApiKeys:
    """A set of keys, each of which opens the service. There may be several, so that they can be rotated.

    Only their SHA-256 digests are kept. All are compared, each in constant time, so that the time of a refusal tells
    nothing about any key.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """Read a file of one key per line; empty lines and lines that begin with # are skipped. Raises BadKeys."""
        try:
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as e:
            raise BadKeys(f"{path} cannot be read ({e})") from None
        keys = {number: line for number, line in enumerate(lines, 1) if line and not line.startswith("#")}
        if not keys:
            raise BadKeys(f"{path} holds no key: write one a line, or unset this setting to serve without keys")
        for number, key in keys.items():
            if len(key) < SHORTEST or not _TOKEN.fullmatch(key):
                raise BadKeys(
                    f"line {number} of {path} is not a key: a key has {SHORTEST} or more of the characters "
                    "A-Z a-z 0-9 . _ ~ + / = -, as `openssl rand -base64 32` makes them"
                )
        return cls(keys.values())

    def check(self, authorization: bytes) -> None:
        """Raise Unauthorized unless the header Authorization carries a key."""
        given = _BEARER.fullmatch(authorization)
        if given is None:
            raise Unauthorized("this service needs an API key: send it as Authorization: Bearer KEY")
        digest = _digest(given[1])
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise Unauthorized("this API key is not one of this service's: ask its operator for a valid one")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
