"""The latents of an election: z ~ N(0, I), from a stream of pseudo-random numbers that depends only on its seed.

Philox is keyed by the seed (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). So streams of
neighbouring seeds are independent, and neither an image's place in a request nor what it is batched with matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Stream = Mapping[str, Any]  # how far an election's stream has been drawn: the state of a Philox generator

_ZEROS = np.zeros(4, np.uint64)
_ZEROS.setflags(write=False)


def stream(seed: int) -> Stream:
    """Return the beginning of a seed's stream: that of ``numpy.random.Philox(key=seed)``. `seed` is in [0, 2^64)."""
    key = np.array((seed, 0), np.uint64)
    return {
        "bit_generator": "Philox",
        "state": {"counter": _ZEROS, "key": key},
        "buffer": _ZEROS,
        "buffer_pos": len(_ZEROS),
        "has_uint32": 0,
        "uinteger": 0,
    }


class Latents:
    """One generator that is set to the stream of each election in turn.

    Setting it takes a tenth of the time that making a new one takes.
    """

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)

    def draw(self, stream: Stream, out: np.ndarray) -> Stream:
        """Fill `out` [n, latent] float32 with the stream's next latents, and return the rest of the stream."""
        self._bits.state = stream  # type: ignore[assignment]
        self._generator.standard_normal(out=out, dtype=np.float32)
        return self._bits.state
