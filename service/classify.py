"""The two endpoints that classify: request -> array -> job -> answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

import numpy as np
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from service import answers, bodies
from service.bundle import Bundle
from service.disconnect import WhileConnected
from service.engine import Engine
from service.envelope import Exchange
from service.errors import DeadlineExceeded, SeedRefused
from service.images import Reader
from service.metrics import Metrics
from service.options import FastOptions, Options, RobustOptions, parse
from service.pipeline import Ballot, Job

# What is decoded on the event loop: a body of at most so many bytes, with at most so many images, of at most so many
# pixels each. That takes 0.1 ms for one MNIST digit, 1 to 2 ms at worst, where a thread's wake-up and its fight for the
# interpreter cost as much again. All else is decoded in the pool, or it would hold up other requests.
INLINE_BYTES = 16 * 2**10
INLINE_IMAGES = 8
INLINE_PIXELS = 64 * 64

T = TypeVar("T")


class Classification:
    """The endpoints over one bundle and its engine."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        *,
        provider: str,
        reader: Reader,
        pool: Executor,
        metrics: Metrics,
        robust_options: type[RobustOptions],
        allow_seed: bool,
    ) -> None:
        """`pool`: decodes what is too large for the event loop. `robust_options`: with this service's limits."""
        _, height, width = bundle.manifest.input.shape
        self._inline_bytes = INLINE_BYTES if height * width <= INLINE_PIXELS else 0
        self._engine = engine
        self._reader = reader
        self._pool = pool
        self._metrics = metrics
        self.robust_options = robust_options
        self._allow_seed = allow_seed
        self._classes = bundle.manifest.classes
        self._served = {"bundle": answers.bundle_name(bundle), "provider": provider}

    async def fast(self, request: Request) -> Response:
        """The fast path: the first pass only."""
        exchange: Exchange = request.state.exchange
        self._engine.admission["fast"].check(1)  # before the body is read: a full queue costs nothing more
        images, _, decode = await self._read(request, FastOptions)
        exchange.fields["images"] = len(images)
        async with WhileConnected(request.receive):
            job = await self._engine.run(Job(images))
        self._metrics.first_pass(job, decode=decode)
        timings = answers.fast_timings(job, decode=decode, total=time.monotonic() - exchange.arrived)
        return self._answer(exchange, answers.fast_predictions(job, self._classes), timings)

    async def robust(self, request: Request) -> Response:
        """The robust path: both passes."""
        exchange: Exchange = request.state.exchange
        self._engine.admission["robust"].check(1)
        images, options, decode = await self._read(request, self.robust_options)
        exchange.fields["images"] = len(images)
        ballot = Ballot(samples=options.samples, risk=options.risk, seed=options.seed)
        deadline = None if options.deadline_ms is None else exchange.arrived + options.deadline_ms / 1e3
        async with WhileConnected(request.receive):
            job = await self._engine.run(Job(images, ballot, deadline))

        outcomes = [outcome for outcome in job.outcomes if outcome is not None]
        if unvoted := sum(not outcome.votes for outcome in outcomes):
            raise DeadlineExceeded(
                f"no vote was cast for {unvoted} of {len(images)} images within {options.deadline_ms} ms: "
                "give a later deadline_ms, or send fewer images"
            )
        predictions = answers.robust_predictions(job, outcomes, options, self._classes)
        agree = [prediction["agree"] for prediction in predictions]
        self._metrics.first_pass(job, decode=decode)
        self._metrics.elections(job, outcomes, agree=agree)
        exchange.fields["votes"] = sum(outcome.votes for outcome in outcomes)
        exchange.fields["agree"] = sum(agree)
        timings = answers.robust_timings(job, decode=decode, total=time.monotonic() - exchange.arrived)
        return self._answer(exchange, predictions, timings)

    def _answer(self, exchange: Exchange, predictions: list[dict[str, Any]], timings: dict[str, float]) -> Response:
        content = {
            "predictions": predictions,
            **self._served,
            "timings": timings,
            "request_id": exchange.request_id,
        }
        return Response(to_json(content), media_type="application/json")

    async def _read(self, request: Request, model: type[Options]) -> tuple[np.ndarray, Options, float]:
        """Images [N, *shape] and options of a request, and the seconds that decoding took."""
        content_type = request.headers.get("content-type", "")
        query: bytes = request.scope["query_string"]
        data = await request.body()
        began = time.monotonic()
        if len(data) > self._inline_bytes:
            images, options = await self._in_pool(lambda: self._decode(content_type, query, data, model))
        else:
            body, options = self._take_apart(content_type, query, data, model)
            if (
                options.resize or len(body.sources) > INLINE_IMAGES
            ):  # to be resized, a small file may hold a large image
                images = await self._in_pool(lambda: self._reader.read(body.sources, resize=options.resize))
            else:
                images = self._reader.read(body.sources, resize=False)
        return images, options, time.monotonic() - began

    def _decode(self, content_type: str, query: bytes, data: bytes, model: type[Options]) -> tuple[np.ndarray, Options]:
        body, options = self._take_apart(content_type, query, data, model)
        return self._reader.read(body.sources, resize=options.resize), options

    def _take_apart(
        self, content_type: str, query: bytes, data: bytes, model: type[Options]
    ) -> tuple[bodies.Body, Options]:
        body = bodies.parse(content_type, data, max_images=self._reader.max_images)
        options = parse(model, query, body.options)
        if not self._allow_seed and getattr(options, "seed", None) is not None:
            raise SeedRefused("this service chooses the seed itself: leave seed out, or ask its operator to allow it")
        return body, options

    async def _in_pool(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)
