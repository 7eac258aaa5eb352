"""The latents of an election: z ~ N(0, I), from a stream of pseudo-random numbers that depends only on its seed.

Philox is keyed by the seed (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). So streams of
neighbouring seeds are independent, and neither an image's place in a request nor what it is batched with matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

# Streams that are kept for later elections, at most: more than have votes in one round. Each takes 0.9 kB.
KEPT = 1024

# The least latents that threads share out: fewer are drawn before another thread has woken up.
SHARED = 1024

# The most threads that draw beside a GPU. On the machine of docs/gpu.md, one drew 1.5 million latents a second.
DRAWERS = 8


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


Part = tuple[Stream, np.ndarray]  # a stream, and the array to fill with its next latents


def drawing(threads: int) -> Callable[[Sequence[Part]], None]:
    """Return what fills all parts of a round, in as many threads.

    numpy lets go of the interpreter's lock while it fills an array. No stream may be in two parts, so each is drawn by
    one thread, and its latents do not depend on how many threads there are.
    """
    if threads == 1:
        return _draw
    pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="carso-latents")

    def share_out(parts: Sequence[Part]) -> None:
        ends = np.cumsum([len(out) for _, out in parts])
        if not parts or ends[-1] < SHARED:
            _draw(parts)
            return
        cuts = [0, *np.searchsorted(ends, ends[-1] * np.arange(1, threads) / threads, side="right"), len(parts)]
        own, *others = (parts[start:end] for start, end in pairwise(cuts))
        waiting = [pool.submit(_draw, each) for each in others]
        _draw(own)
        for each in waiting:
            each.result()

    return share_out


def _draw(parts: Sequence[Part]) -> None:
    for stream, out in parts:
        stream.draw(out)
