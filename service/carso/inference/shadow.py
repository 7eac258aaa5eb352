"""Shadow mode: a share of the fast path's answers, counted by the robust path while the engine has nothing else to do.

Nobody waits for these counts. They show whether the two paths agree on traffic that only asks for the fast one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from carso.inference.admission import QueueFull
from carso.inference.engine import Engine, EngineError
from carso.inference.jobs import Job, Outcome, VotePlan
from carso.inference.thinning import drawn

MOST = 64  # images that wait: as many as one request may hold by default
PAUSE = 0.02  # seconds between two looks whether the engine is idle


class Shadow:
    """Draws images, keeps a few until the engine is idle, and counts them one by one.

    An image is drawn with the chance `share`, whatever it shows, so that what comes of it is a fair sample. If others
    wait already, it is dropped. A count that has begun goes on beside what comes then, with one small ballot a round.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        share: float,
        plan: VotePlan,
        counted: Callable[[Outcome, bool, str | None], None],
        dropped: Callable[[], None],
        draw: Callable[[], float] = drawn,
    ) -> None:
        """`share`: in [0, 1]. `counted` is called with each outcome, whether it agrees with the fast path, and the name
        of the caller's key; `dropped` for each image that was drawn and not counted.
        """
        self._engine = engine
        self._share = share
        self._plan = plan
        self._counted = counted
        self._dropped = dropped
        self._draw = draw
        self._waiting: deque[tuple[np.ndarray, int, str | None]] = deque()
        self._task: asyncio.Task[None] | None = None

    def offer(self, images: np.ndarray, labels: Sequence[int], caller: str | None) -> None:
        """Draw from images [n, *shape] float32 that the fast path gave `labels`. Call this on the event loop."""
        if not self._share:
            return
        for image, label in zip(images, labels, strict=True):
            if self._draw() >= self._share:
                continue
            if len(self._waiting) >= MOST:
                self._dropped()
            else:
                self._waiting.append((image.copy(), label, caller))  # not the whole batch
        if self._waiting and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        """Count what waits, until there is nothing more, or the engine ends."""
        while self._waiting:
            if self._engine.in_flight:
                await asyncio.sleep(PAUSE)
                continue
            image, label, caller = self._waiting.popleft()
            try:
                (outcome,) = (await self._engine.run(Job(image[None], self._plan))).outcomes
            except QueueFull:
                self._dropped()
            except EngineError:
                return
            else:
                self._counted(outcome, outcome.label == label, caller)
