"""The latents of an election: z ~ N(0, I), from a stream of pseudo-random numbers that depends only on its seed.

Philox is keyed by the seed (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). So streams of
neighbouring seeds are independent, and neither an image's place in a request nor what it is batched with matters.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# Streams that are kept for later elections, at most: more than have votes in one round. Each takes 0.9 kB.
KEPT = 1024


class Stream:
    """The latents of `seed`, in [0, 2^64), in order: those of ``numpy.random.Philox(key=seed)``."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=seed)
        self._generator = np.random.Generator(self._bits)

    def draw(self, out: np.ndarray) -> None:
        """Fill `out` [n, latent] float32 with the next latents."""
        self._generator.standard_normal(out=out, dtype=np.float32)

    def restart(self, beginning: Mapping[str, object]) -> None:
        """Go to `beginning`, a state of Philox: that of another seed."""
        self._bits.state = beginning  # type: ignore[assignment]


class Streams:
    """Streams for elections that come and go. Not for use by two threads at once.

    Setting a stream to another seed takes a tenth of the time that making a new one takes.
    """

    def __init__(self) -> None:
        self._idle: list[Stream] = []
        self._key = np.zeros(2, np.uint64)
        nothing = np.zeros(4, np.uint64)
        self._beginning = {
            "bit_generator": "Philox",
            "state": {"counter": nothing, "key": self._key},
            "buffer": nothing,
            "buffer_pos": len(nothing),
            "has_uint32": 0,
            "uinteger": 0,
        }

    def begin(self, seed: int) -> Stream:
        """Return the stream of `seed`, at its beginning."""
        if not self._idle:
            return Stream(seed)
        stream = self._idle.pop()
        self._key[0] = seed
        stream.restart(self._beginning)
        return stream

    def end(self, stream: Stream) -> None:
        """Take back a stream of which nothing more is drawn."""
        if len(self._idle) < KEPT:
            self._idle.append(stream)
