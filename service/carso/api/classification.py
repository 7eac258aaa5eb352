"""From images and options to predictions: one request's job, run by the engine and accounted for.

Every API of the service ends here; each reads its own requests and writes its own answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.requests import Request

from carso.api import answers
from carso.errors import ClientGone, DeadlineExceeded, SeedRefused
from carso.http.disconnect import WhileConnected
from carso.http.envelope import Exchange
from carso.inference.engine import Engine, EngineStopped
from carso.inference.pipeline import Ballot, Job, Path
from carso.options import RobustOptions
from carso.settings import Evidence
from carso.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Classified:
    """What one caller is told: `predictions` as answers.RobustPrediction or FastPrediction, or as much of them as the
    operator lets callers see; `timings` likewise.
    """

    predictions: list[dict[str, Any]]
    timings: dict[str, float] | None  # None: withheld


class Classifier:
    """Both paths over one engine."""

    def __init__(
        self,
        engine: Engine,
        *,
        metrics: Metrics,
        trace: Callable[[Job], None],
        classes: tuple[str, ...],
        allow_seed: bool,
        evidence: Evidence,
    ) -> None:
        """`trace` is called with every finished job. `evidence`: "label" withholds tallies, scores and timings."""
        self._engine = engine
        self._metrics = metrics
        self._trace = trace
        self._classes = classes
        self._allow_seed = allow_seed
        self._label_only = evidence == "label"

    def check(self, path: Path) -> None:
        """Raise QueueFull if not even one image fits: before a body is read, so that a full queue costs no more."""
        self._engine.admission[path].check(1)

    async def fast(self, request: Request, images: np.ndarray, *, decode: float) -> Classified:
        """The first pass of `images` [N, *shape], which took `decode` seconds to decode."""
        exchange: Exchange = request.state.exchange
        job = await self._run(request, Job(images))
        self._metrics.job(job, decode=decode)
        timings = answers.fast_timings(job, decode=decode, total=time.monotonic() - exchange.arrived)
        predictions = answers.fast_predictions(job, self._classes)
        return self._told(exchange, predictions, timings)

    async def robust(
        self, request: Request, images: np.ndarray, options: RobustOptions, *, decode: float
    ) -> Classified:
        """Both passes. Raises SeedRefused, DeadlineExceeded."""
        if not self._allow_seed and options.seed is not None:
            raise SeedRefused("this service chooses the seed itself: leave seed out, or ask its operator to allow it")
        exchange: Exchange = request.state.exchange
        ballot = Ballot(samples=options.samples, risk=options.risk, seed=options.seed)
        deadline = None if options.deadline_ms is None else exchange.arrived + options.deadline_ms / 1e3
        job = await self._run(request, Job(images, ballot, deadline))

        outcomes = [outcome for outcome in job.outcomes if outcome is not None]
        if any(outcome.rule == "deadline" for outcome in outcomes):
            self._metrics.cancellation("deadline")
        if unvoted := sum(not outcome.votes for outcome in outcomes):
            raise DeadlineExceeded(
                f"no vote was cast for {unvoted} of {len(images)} images within {options.deadline_ms} ms: "
                "give a later deadline_ms, or send fewer images"
            )
        predictions = answers.robust_predictions(job, outcomes, options, self._classes)
        agree = [prediction["agree"] for prediction in predictions]
        self._metrics.job(job, decode=decode)
        self._metrics.elections(outcomes, agree=agree)
        timings = answers.robust_timings(job, decode=decode, total=time.monotonic() - exchange.arrived)
        exchange.fields["votes"] = sum(outcome.votes for outcome in outcomes)
        exchange.fields["agree"] = sum(agree)
        return self._told(exchange, predictions, timings)

    def _told(self, exchange: Exchange, predictions: list[dict[str, Any]], timings: dict[str, float]) -> Classified:
        exchange.fields["labels"] = [prediction["label"] for prediction in predictions]
        exchange.fields["timings"] = timings
        if self._label_only:
            return Classified([answers.label_only(prediction) for prediction in predictions], None)
        return Classified(predictions, timings)

    async def _run(self, request: Request, job: Job) -> Job:
        exchange: Exchange = request.state.exchange
        exchange.fields["images"] = len(job.images)
        try:
            async with WhileConnected(request.receive):
                await self._engine.run(job)
        except ClientGone:
            self._metrics.cancellation("client_gone")
            raise
        except EngineStopped:
            self._metrics.cancellation("stopping")
            raise
        self._trace(job)
        return job
