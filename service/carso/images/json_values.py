"""Parse JSON text to Python values. A short text may hold more of them than the service has time for."""

from __future__ import annotations

import json
from math import prod
from typing import Any

from pydantic_core import from_json

from carso.errors import BodyTooLarge, UndecodableJson

# Parsing JSON holds the interpreter, in a thread or not. A value takes 0.05 to 0.5 microseconds and up to 130 bytes,
# and 8 MiB may hold four million values. The number below holds up other requests for 20 to 70 ms.
LEAST_VALUES = 2**17
SLACK = 1024  # for what surrounds the values of an image
# Each name in an object may cause an error message of its own. An honest request has a dozen names. Data URLs contain a
# colon, too.
MAX_COLONS = 2**13


def limit(shape: tuple[int, ...]) -> int:
    """Return how many values and lists a JSON text may hold: one image of `shape` (C, H, W), or many small ones."""
    channels, height, _ = shape
    return max(prod(shape) + channels * (height + 1) + SLACK, LEAST_VALUES)


def parse(data: bytes, *, max_values: int) -> Any:
    """Parse JSON of at most `max_values` values and lists.

    It may be in UTF-8, UTF-16 or UTF-32, with a byte order mark or without. NaN and Infinity are read too, so that they
    can be refused by name. Raises BodyTooLarge, UndecodableJson.
    """
    data = _utf8(data)
    found = data.count(b",") + data.count(b"[") + data.count(b"{")
    if found > max_values or data.count(b":") > MAX_COLONS:
        raise BodyTooLarge(
            f"the JSON holds {found} values and lists, or more than {MAX_COLONS} names, and at most {max_values} "
            "values are allowed: send .npy, encoded images or tensors in binary form, or several requests"
        )
    try:
        return from_json(data)
    except ValueError as e:
        raise UndecodableJson(f"the body is not JSON ({e})") from None


def _utf8(data: bytes) -> bytes:
    if (encoding := json.detect_encoding(data)) == "utf-8":
        return data
    try:
        return data.decode(encoding).encode()
    except UnicodeError as e:
        raise UndecodableJson(f"the body is not JSON ({e})") from None
