"""JSON text -> Python values, of which a short text may hold more than the service has time for."""

from __future__ import annotations

from math import prod
from typing import Any

from pydantic_core import from_json

from carso.errors import BodyTooLarge, UndecodableJson

# Whoever parses JSON holds the interpreter meanwhile, thread or not: a value takes 0.05 to 0.5 microseconds and up to
# 130 bytes, and 8 MiB may be four million of them. So many hold up other requests for 20 to 70 ms.
LEAST_VALUES = 2**17
SLACK = 1024  # what stands around the values of an image
# Each name in an object may become a complaint of its own about the request. An honest one has a dozen; data URLs have
# a colon, too.
MAX_COLONS = 2**13


def limit(shape: tuple[int, ...]) -> int:
    """Values and lists that one JSON text may hold: one image of any `shape` fits, and many small ones."""
    channels, height, _ = shape
    return max(prod(shape) + channels * (height + 1) + SLACK, LEAST_VALUES)


def parse(data: bytes, *, max_values: int) -> Any:
    """Reads NaN and Infinity too, so that they can be refused by name. Raises BodyTooLarge, UndecodableJson."""
    found = data.count(b",") + data.count(b"[") + data.count(b"{")
    if found > max_values or data.count(b":") > MAX_COLONS:
        raise BodyTooLarge(
            f"the JSON holds {found} values and lists, or more than {MAX_COLONS} names, and at most {max_values} "
            "values are taken: send .npy, encoded images or tensors in binary form, or several requests"
        )
    try:
        return from_json(data)
    except ValueError as e:
        raise UndecodableJson(f"the body is not JSON ({e})") from None
