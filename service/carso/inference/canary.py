"""The canary: a bundle's own samples, classified now and then, so that a wrong model, precision or device shows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from itertools import cycle
from math import nan

import numpy as np

from carso.board.whole import Whole
from carso.inference.admission import QueueFull
from carso.inference.engine import Engine, EngineError
from carso.inference.jobs import Job, VotePlan
from carso.samples import Sample

log = logging.getLogger(__name__)


class Canary:
    """Asks the engine about one sample after another, while it has nothing else to do.

    Its samples are those that the robust path answered rightly when they were made, attacked ones among them. Each is
    counted as it was then: with the same seed, votes and risk.
    """

    def __init__(
        self,
        engine: Engine,
        samples: Sequence[tuple[Sample, np.ndarray]],
        *,
        votes: int,
        risk: float,
        every: float,
        whole: Whole | None = None,
    ) -> None:
        """`samples` with their images [*shape] float32. `votes`: asked for. `every`: seconds between two samples.
        `whole`: the service whose workers each ask their own engine; None: this process alone.
        """
        self._engine = engine
        self._samples = [(sample, image) for sample, image in samples if sample.robust_right]
        self._votes, self._risk, self._every = votes, risk, every
        self._right: dict[str, bool] = {}  # the last answer to each sample, by its file
        whole = whole or Whole()
        self._asked_of_all, self._right_of_all = whole.part("canary_asked"), whole.part("canary_right")

    @property
    def ratio(self) -> float:
        """The share of the samples asked so far whose last answer was right; not a number before the first.

        A sample counts once for each worker that was asked.
        """
        asked = sum(self._asked_of_all.each())
        return sum(self._right_of_all.each()) / asked if asked else nan

    async def run(self) -> None:
        """Ask until cancelled, or until the engine ends. A turn in which the engine has other work is left out."""
        for sample, image in cycle(self._samples):
            await asyncio.sleep(self._every)
            while self._engine.in_flight:
                await asyncio.sleep(self._every)
            try:
                await self.ask(sample, image)
            except QueueFull:
                continue
            except EngineError:
                return

    async def ask(self, sample: Sample, image: np.ndarray) -> None:
        """Ask about one sample. Raises QueueFull, EngineError."""
        plan = VotePlan(samples=self._votes, risk=self._risk, seed=sample.seed)
        (outcome,) = (await self._engine.run(Job(image[None], plan))).outcomes
        right = outcome.label == sample.label
        if not right and self._right.get(sample.file, True):
            log.warning("the canary sample %s is a %d, and is answered %d", sample.file, sample.label, outcome.label)
        self._right[sample.file] = right
        self._asked_of_all.mine, self._right_of_all.mine = len(self._right), sum(self._right.values())
