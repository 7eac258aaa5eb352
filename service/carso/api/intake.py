"""From a request's body to its images: what is small at once, what is large in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

import numpy as np
from starlette.types import Receive

from carso.http.disconnect import WhileConnected
from carso.images.numbers import Source
from carso.options import ImageOptions

# What is done on the event loop: a body of at most so many bytes, with at most so many images, of at most so many
# pixels each. That takes 0.1 ms for one MNIST digit, 1 to 2 ms at worst, where a thread's wake-up and its fight for the
# interpreter cost as much again. All else is done in the pool, or it would hold up other requests.
INLINE_BYTES = 16 * 2**10
INLINE_IMAGES = 8
INLINE_PIXELS = 64 * 64

T = TypeVar("T")
Read = Callable[[Sequence[Source], ImageOptions], np.ndarray]
"""Sources and options -> images [n, *shape] float32: ``carso.images.reader.Reader.read``."""


class Intake:
    """Runs what takes a body apart, and then the reader of its images.

    If the client hangs up, which `receive` tells, the pool does not begin what it has not begun, and ClientGone is
    raised.
    """

    def __init__(self, read: Read, pool: Executor, *, pixels: int) -> None:
        """`pool` does what is too large for the event loop. `pixels`: of one image, which all channels share."""
        self._inline_bytes = INLINE_BYTES if pixels <= INLINE_PIXELS else 0
        self._reading = read
        self._pool = pool

    async def parse(self, parse: Callable[[], T], *, size: int, receive: Receive) -> T:
        """Return what `parse` makes of a body of `size` bytes. Raises what it raises."""
        return await self._run(parse, inline=size <= self._inline_bytes, receive=receive)

    async def read(
        self, sources: Sequence[Source], options: ImageOptions, *, size: int, receive: Receive
    ) -> np.ndarray:
        """Return the images [n, *shape] float32 of a body of `size` bytes. Raises the errors of `Read`."""
        # to be resized, a small file may hold a large image
        inline = size <= self._inline_bytes and not options.resize and len(sources) <= INLINE_IMAGES
        return await self._run(partial(self._reading, sources, options), inline=inline, receive=receive)

    async def _run(self, function: Callable[[], T], *, inline: bool, receive: Receive) -> T:
        if inline:
            return function()
        async with WhileConnected(receive):
            return await asyncio.get_running_loop().run_in_executor(self._pool, function)
