"""Messages between the processes of one service, over a socket that only they have.

A message is any object that can be pickled. Its arrays are not: their memory goes over the socket as it is, and those
that arrive are views of what was received (PEP 574). Pickles can run code, so nothing else may write to such a socket.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from typing import Any

_NUMBER = struct.Struct("<Q")


def packed(message: object) -> list[bytes | memoryview]:
    """Return the parts of a message, to be sent one after the other.

    They are: the size of all that follows; how many parts follow, and the size of each; the pickle; the arrays.
    """
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts: list[bytes | memoryview] = [head, *(buffer.raw() for buffer in buffers)]
    sizes = b"".join(_NUMBER.pack(len(part)) for part in parts)
    total = _NUMBER.size + len(sizes) + sum(map(len, parts))
    return [_NUMBER.pack(total) + _NUMBER.pack(len(parts)) + sizes, *parts]


class Unpacker:
    """Puts messages together again, however they were cut."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """Take what was received, and yield the messages that are whole."""
        self._received += data
        while len(self._received) >= _NUMBER.size:
            end = _NUMBER.size + _NUMBER.unpack_from(self._received)[0]
            if len(self._received) < end:
                return
            message = bytes(memoryview(self._received)[_NUMBER.size : end])  # which its arrays keep
            del self._received[:end]
            yield _unpacked(message)


def _unpacked(message: bytes) -> Any:
    (count,) = _NUMBER.unpack_from(message)
    at = _NUMBER.size * (1 + count)
    parts = []
    for part in range(1, 1 + count):
        (size,) = _NUMBER.unpack_from(message, _NUMBER.size * part)
        parts.append(memoryview(message)[at : at + size])
        at += size
    return pickle.loads(parts[0], buffers=parts[1:])  # noqa: S301  see above
