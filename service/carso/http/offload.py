"""Bodies -> arrays, small ones at once, large ones in threads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

import numpy as np
from starlette.types import Receive

from carso.http.disconnect import WhileConnected
from carso.images.reader import Reader, Source
from carso.options import Options

# What is decoded on the event loop: a body of at most so many bytes, with at most so many images, of at most so many
# pixels each. That takes 0.1 ms for one MNIST digit, 1 to 2 ms at worst, where a thread's wake-up and its fight for the
# interpreter cost as much again. All else is decoded in the pool, or it would hold up other requests.
INLINE_BYTES = 16 * 2**10
INLINE_IMAGES = 8
INLINE_PIXELS = 64 * 64

T = TypeVar("T")


class Decoder:
    """Runs what takes a body apart, and then the reader of its images."""

    def __init__(self, reader: Reader, pool: Executor) -> None:
        """`pool`: decodes what is too large for the event loop."""
        _, height, width = reader.spec.shape
        self._inline_bytes = INLINE_BYTES if height * width <= INLINE_PIXELS else 0
        self._reader = reader
        self._pool = pool

    async def decode(
        self, size: int, take_apart: Callable[[], tuple[list[Source], Options]], receive: Receive
    ) -> tuple[np.ndarray, Options, float]:
        """Images [N, *shape] and options of a body of `size` bytes, and the seconds that this took.

        If the client hangs up, which `receive` tells, the pool does not begin what it has not begun. Raises what
        `take_apart` raises, the errors of `Reader.read`, ClientGone.
        """
        began = time.monotonic()
        if size > self._inline_bytes:
            images, options = await self._in_pool(lambda: self._decode(*take_apart()), receive)
        else:
            sources, options = take_apart()
            # to be resized, a small file may hold a large image
            if options.resize or len(sources) > INLINE_IMAGES:
                images, options = await self._in_pool(lambda: self._decode(sources, options), receive)
            else:
                images, options = self._decode(sources, options)
        return images, options, time.monotonic() - began

    def _decode(self, sources: list[Source], options: Options) -> tuple[np.ndarray, Options]:
        return self._reader.read(sources, resize=options.resize), options

    async def _in_pool(self, function: Callable[[], T], receive: Receive) -> T:
        async with WhileConnected(receive):
            return await asyncio.get_running_loop().run_in_executor(self._pool, function)
