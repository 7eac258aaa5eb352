"""From images and options to predictions: one request's job, run by the engine and accounted for.

Every API of the service ends here. Each reads its own requests and writes its own answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from starlette.requests import Request

from carso.api import answers
from carso.bundle import Typical
from carso.choices import Duplicates, Evidence, PathName, Untypical
from carso.errors import CannotCertify, ClientGone, DeadlineExceeded, NearDuplicate, SeedRefused, UntypicalImage
from carso.http.disconnect import WhileConnected
from carso.http.exchange import Exchange
from carso.inference import explanation
from carso.inference.admission import QueueFull
from carso.inference.duplicates import Recent
from carso.inference.engine import Engine, EngineStopped
from carso.inference.jobs import Certificate, Certify, FirstSeen, Job, Kinds, News, Result, Standing, VotePlan
from carso.options import FastOptions, RobustOptions
from carso.telemetry.alarms import Alarms
from carso.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Classified:
    """What one caller is told."""

    predictions: list[dict[str, Any]]  # as answers.RobustPrediction or FastPrediction, or what evidence callers may see
    timings: dict[str, float] | None  # None: withheld
    result: Result  # for the service itself: nothing of it is withheld


class Classification:
    """Classifies images on both paths, over one engine."""

    def __init__(
        self,
        engine: Engine,
        *,
        metrics: Metrics,
        alarms: Alarms,
        trace: Callable[[Job, Result], None],
        classes: tuple[str, ...],
        allow_seed: bool,
        evidence: Evidence,
        bounds: Typical | None,
        untypical: Untypical,
        duplicates: Duplicates,
        recent: Recent | None,
        shadow: Callable[[np.ndarray, Sequence[int], str | None], None],
        unproven: str | None = None,
    ) -> None:
        """`trace` is called with every finished job. `evidence`: "label" withholds tallies, scores and timings.
        `bounds`: the thresholds of typical images; None: the bundle has none. `recent`: what images are compared with;
        None: `duplicates` is off. `shadow` is called with the images of the fast path, their labels, and the name of
        the caller's key, if any. `unproven`: why nothing can be proven; None: it can.
        """
        self._engine = engine
        self._metrics = metrics
        self._alarms = alarms
        self._trace = trace
        self._classes = classes
        self._allow_seed = allow_seed
        self._label_only = evidence == "label"
        self._bounds = bounds
        self._refuses_untypical = untypical == "refuse"
        self._recent = recent
        self._refuses_duplicates = duplicates == "refuse"
        self._unproven = unproven
        self._shadow = shadow

    def check(self, path: PathName) -> None:
        """Raise QueueFull if not even one image fits: before a body is read, so that a full queue costs no more."""
        self._engine.admission[path].check(1)

    def certify(self, options: FastOptions) -> Certify | None:
        """Return what is to be proven; None: nothing. Raises CannotCertify."""
        if options.certify == "off":
            return None
        if self._unproven is not None:
            raise CannotCertify(f"certify: {options.certify} is not possible here: {self._unproven}")
        return Certify(options.certify, options.certify_eps)

    async def fast(
        self, request: Request, images: np.ndarray, options: FastOptions, *, decode: float, shadowed: bool = True
    ) -> Classified:
        """Answer with the first pass of `images` [n, *shape] float32, which took `decode` seconds to decode.

        `shadowed`: some of them may be counted later, for what the metrics say and for nobody else.

        Raises CannotCertify, UntypicalImage, NearDuplicate, QueueFull, ClientGone, and the engine's errors.
        """
        exchange = Exchange.of(request.scope)
        job = Job(images, certify=self.certify(options))
        result = await self._run(request, job)
        self._metrics.result("fast", result, decode=decode)
        timings = answers.fast_timings(result.times, decode=decode, total=time.monotonic() - exchange.arrived)
        predictions = answers.fast_predictions(result, self._classes, self._bounds)
        if shadowed:
            self._shadow(images, [prediction["label"] for prediction in predictions], _caller(exchange))
        self._note_proofs(exchange, job, result)
        return self._told(exchange, "fast", result, predictions, timings)

    async def robust(
        self,
        request: Request,
        images: np.ndarray,
        options: RobustOptions,
        *,
        decode: float,
        sampled: bool = True,
        proven: tuple[Certificate | None, ...] | None = None,
        explain: bool = False,
        follow: Callable[[News], None] | None = None,
    ) -> Classified:
        """Answer with both passes of `images` [n, *shape] float32, which took `decode` seconds to decode.

        `sampled`: the images were not chosen for what they show, so that whether the paths agree on them is evidence.
        `proven`: what an answer of the fast path has proven of them for these options; None: nothing was asked yet.
        `explain`: whether the result has explanations. `follow`: as of Engine.run.

        Raises SeedRefused, CannotCertify, DeadlineExceeded, UntypicalImage, NearDuplicate, QueueFull, ClientGone, and
        the engine's errors.
        """
        if not self._allow_seed and options.seed is not None:
            raise SeedRefused("this service chooses the seed itself: leave seed out, or ask its operator to allow it")
        exchange = Exchange.of(request.scope)
        plan = VotePlan(samples=options.samples, risk=options.risk, seed=options.seed)
        deadline = None if options.deadline_ms is None else exchange.arrived + options.deadline_ms / 1e3
        job = Job(images, plan, deadline, explain=explain, certify=self.certify(options), proven=proven)
        result = await self._run(request, job, follow)

        if any(outcome.ending == "deadline" for outcome in result.outcomes):
            self._metrics.cancellation("deadline")
        if unvoted := sum(not outcome.votes and outcome.ending != "certificate" for outcome in result.outcomes):
            raise DeadlineExceeded(
                f"no vote was cast for {unvoted} of {len(images)} images within {options.deadline_ms} ms: "
                "give a later deadline_ms, or send fewer images"
            )
        predictions = answers.robust_predictions(result, plan, self._classes, self._bounds)
        agree = [prediction["agree"] for prediction in predictions]
        self._metrics.result("robust", result, decode=decode)
        self._metrics.elections(result.outcomes, agree=agree, sampled=sampled)
        if sampled:
            self._alarms.elections(result.outcomes, agree=agree, caller=_caller(exchange))
        if proven is None:
            self._note_proofs(exchange, job, result)
        exchange.votes = sum(outcome.votes for outcome in result.outcomes)
        exchange.agree = sum(agree)
        timings = answers.robust_timings(result.times, decode=decode, total=time.monotonic() - exchange.arrived)
        return self._told(exchange, "robust", result, predictions, timings)

    def _note_proofs(self, exchange: Exchange, job: Job, result: Result) -> None:
        if job.certify is not None and result.certificates is not None:
            certified = [each is not None for each in result.certificates]
            self._alarms.certified(certified, asked=job.certify, caller=_caller(exchange))

    def _told(
        self,
        exchange: Exchange,
        path: PathName,
        result: Result,
        predictions: list[dict[str, Any]],
        timings: dict[str, float],
    ) -> Classified:
        exchange.labels = [prediction["label"] for prediction in predictions]
        exchange.timings = timings
        self._metrics.certified(path, (p["certified"] is not None for p in predictions if "certified" in p))
        self._metrics.typical(path, (prediction["typical"] for prediction in predictions if "typical" in prediction))
        if self._refuses_untypical:
            self._check_typical(predictions)
        if self._label_only:
            return Classified([answers.label_only(prediction) for prediction in predictions], None, result)
        return Classified(predictions, timings, result)

    def _check_typical(self, predictions: list[dict[str, Any]]) -> None:
        """Raise UntypicalImage if one of the images is not typical."""
        for index, prediction in enumerate(predictions):
            if self._bounds is not None and prediction.get("typical") is False:
                figures = (
                    ""
                    if self._label_only
                    else f" (excess {prediction['excess']:g}, at most {self._bounds.excess:g}; contrast "
                    f"{prediction['contrast']:g}, at least {self._bounds.contrast:g})"
                )
                raise UntypicalImage(
                    f"image {index} is not like the images that this service knows{figures}, and it refuses such "
                    "images: send one of the kind that /info describes, with its polarity, framing and scale"
                )

    async def _run(self, request: Request, job: Job, follow: Callable[[News], None] | None = None) -> Result:
        exchange = Exchange.of(request.scope)
        exchange.images = len(job.images)
        exchange.charge(job.rows)
        near: list[bool] = []
        kinds: Kinds = (FirstSeen,) if follow is None else (FirstSeen, Standing)

        def compare(news: News) -> None:
            """Look at each image as soon as its code is known, and tell whoever follows no more than is answered."""
            if isinstance(news, FirstSeen):
                near.append(self._is_near(exchange, job, news))
            if follow is not None:
                follow(news)

        try:
            async with WhileConnected(request.receive):
                result = await self._engine.run(job, follow=follow if self._recent is None else compare, kinds=kinds)
        except QueueFull:
            exchange.settle(-job.rows)
            raise
        except NearDuplicate:
            exchange.settle(job.first_pass_rows - job.rows)  # its votes are not counted
            raise
        except ClientGone:
            self._metrics.cancellation("client_gone")
            raise
        except EngineStopped:
            self._metrics.cancellation("stopping")
            raise
        explained = explanation.ROWS * len(result.explanations or ())
        exchange.settle(job.first_pass_rows + sum(outcome.votes for outcome in result.outcomes) + explained - job.rows)
        self._trace(job, result)
        return result if self._recent is None else replace(result, near_duplicates=tuple(near))

    def _is_near(self, exchange: Exchange, job: Job, first: FirstSeen) -> bool:
        """Return whether an image is nearly an earlier one of its sender. Raises NearDuplicate."""
        if self._recent is None:
            return False
        near = self._recent.is_near(exchange.sender, job.images[first.image], first.code)
        self._metrics.near_duplicate(job.path, near, caller=_caller(exchange))
        exchange.near_duplicates = (exchange.near_duplicates or 0) + near
        if near and self._refuses_duplicates:
            sender = "this address" if exchange.caller is None else f"the key of {exchange.caller.name}"
            raise NearDuplicate(
                f"image {first.image} is nearly one that {sender} sent before, and this service refuses such images, "
                "because those who attack send many: do not send changed copies of an image, or ask the operator to "
                "only mark them"
            )
        return near


def _caller(exchange: Exchange) -> str | None:
    """Return the name of the key that a request came with; None: the service asks for none."""
    return None if exchange.caller is None else exchange.caller.name
