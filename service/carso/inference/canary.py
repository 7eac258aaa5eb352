"""The canary: a bundle's own samples, classified now and then, so that a wrong model, precision or device shows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from itertools import cycle
from math import nan

import numpy as np

from carso.board.whole import Whole
from carso.bundle import Bundle, BundleError
from carso.errors import RequestError
from carso.images.reader import Reader
from carso.inference.admission import QueueFull
from carso.inference.engine import Engine, EngineError
from carso.inference.jobs import Job, VotePlan
from carso.samples import SAMPLES, Sample

log = logging.getLogger(__name__)

ASKED, RIGHT = "canary_asked", "canary_right"  # parts of the whole: samples asked so far, and those answered rightly


def canary_of(bundle: Bundle, engine: Engine, *, every: float, whole: Whole) -> Canary | None:
    """Return what asks the engine about the bundle's samples, one each `every` seconds, and notes what comes of them in
    the `whole`. None: there are no samples, or `every` is 0.

    Run it in the process of the engine: only there, all its work shows. Raises BundleError.
    """
    if bundle.samples is None or not every:
        return None
    _, height, width = bundle.manifest.input.shape
    reader = Reader(bundle.manifest.input, max_images=1, max_pixels=height * width)
    images = []
    for sample in bundle.samples.images:
        try:
            images.append((sample, reader.read([bundle.sample_files[sample.file]])[0]))
        except RequestError as e:
            path = bundle.folder / SAMPLES / sample.file
            raise BundleError(f"{path} cannot be classified: {e}. Make it again with: carso-train samples") from None
    return Canary(engine, images, votes=bundle.manifest.samples, risk=bundle.samples.risk, every=every, whole=whole)


def canary_ratio(whole: Whole) -> float:
    """Return the share of the samples asked so far whose last answer was right; not a number before the first.

    A sample counts once for each engine that was asked.
    """
    asked = sum(whole.part(ASKED).each())
    return sum(whole.part(RIGHT).each()) / asked if asked else nan


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
        whole: Whole,
    ) -> None:
        """`samples` with their images [*shape] float32. `votes`: asked for. `every`: seconds between two samples.
        `whole`: the service whose engine this is, or one of them; what comes of the samples is noted there.
        """
        self._engine = engine
        self._samples = [(sample, image) for sample, image in samples if sample.robust_right]
        self._votes, self._risk, self._every = votes, risk, every
        self._right: dict[str, bool] = {}  # the last answer to each sample, by its file
        self._asked_of_all, self._right_of_all = whole.part(ASKED), whole.part(RIGHT)

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
