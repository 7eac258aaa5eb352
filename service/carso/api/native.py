"""The native API: /classify and /classify/fast."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from fastapi import FastAPI
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from carso.api import answers, openapi
from carso.api.classification import Classification, Classified
from carso.api.intake import Intake
from carso.bundle import Bundle
from carso.choices import Evidence, Precision
from carso.errors import EvidenceWithheld, TooManyImages
from carso.http import event_stream, refusals
from carso.http.event_stream import EventStream, Tell
from carso.http.exchange import Exchange
from carso.images import bodies, json_values
from carso.images.numbers import Source
from carso.inference.explanation import SHOWN
from carso.inference.jobs import FirstSeen, News, Standing
from carso.options import MAX_EXPLAINED, ExplainedOptions, FastOptions, Options, parse

PICTURES = 3 + SHOWN  # of one explanation, at most


class Native:
    """Its endpoints."""

    def __init__(
        self,
        classification: Classification,
        intake: Intake,
        bundle: Bundle,
        robust_options: type[ExplainedOptions],
        fast_options: type[FastOptions],
        *,
        provider: str,
        precision: Precision,
        max_images: int,
        evidence: Evidence,
    ) -> None:
        """`robust_options` and `fast_options` hold this service's defaults and limits."""
        self._classification = classification
        self._intake = intake
        self._robust_options, self._fast_options = robust_options, fast_options
        self._spec = bundle.manifest.input
        self._classes = bundle.manifest.classes
        self._max_images = max_images
        self._max_values = json_values.limit(self._spec.shape)
        self._evidence = evidence
        self._precision = precision
        self._served = {"bundle": answers.bundle_name(bundle), "provider": provider}

    def add_to(self, app: FastAPI) -> None:
        """Add the endpoints and their documentation to an application."""
        full = self._evidence == "full"
        openapi.add_endpoint(
            app,
            "/classify",
            self.robust,
            summary="Classify by vote over purified images (the robust path)",
            answer=answers.RobustAnswer if full else answers.RobustLabels,
            events=openapi.EVENTS if full else "",
            errors=openapi.NATIVE_ERRORS + openapi.ROBUST_ERRORS + openapi.SHOWN_ERRORS,
            extra=openapi.operation(self._robust_options, self._spec, max_images=self._max_images),
        )
        openapi.add_endpoint(
            app,
            "/classify/fast",
            self.fast,
            summary="Classify by the first pass alone (the fast path)",
            answer=answers.FastAnswer if full else answers.FastLabels,
            errors=openapi.NATIVE_ERRORS,
            extra=openapi.operation(self._fast_options, self._spec, max_images=self._max_images),
        )

    async def fast(self, request: Request) -> Response:
        """Answer by the first pass only."""
        self._classification.check("fast")
        images, options, decode = await self._read(request, self._fast_options)
        classified = await self._classification.fast(request, images, options, decode=decode)
        return _json(self._content(request, classified))

    async def robust(self, request: Request) -> Response:
        """Answer by both passes and the vote; by events, if those are asked for, while the votes come."""
        self._classification.check("robust")
        by_events = event_stream.wanted(request.headers.get("accept", ""))
        if by_events and self._evidence == "label":
            raise EvidenceWithheld(
                "this service answers with labels only, and shows no votes: leave out Accept: text/event-stream"
            )
        images, options, decode = await self._read(request, self._robust_options)
        if options.explain:
            self._check_explained(images)
        answered = partial(self._robust, request, images, options, decode)
        if by_events:
            return EventStream(lambda tell: answered(partial(self._tell, tell)), last="answer", failed=refusals.event)
        return _json(await answered(None))

    async def _robust(
        self,
        request: Request,
        images: np.ndarray,
        options: ExplainedOptions,
        decode: float,
        follow: Callable[[News], None] | None,
    ) -> dict[str, Any]:
        """Return a RobustAnswer, or RobustLabels. `follow`: as of Engine.run."""
        classified = await self._classification.robust(
            request, images, options, decode=decode, explain=options.explain, follow=follow
        )
        if self._evidence == "label":
            return self._content(request, classified)
        made_of = partial(answers.digests, images)
        digests = await self._intake.parse(made_of, size=images.nbytes, receive=request.receive)
        if options.explain:
            draw = partial(self._explain, images, classified)
            await self._intake.parse(draw, size=PICTURES * images.nbytes, receive=request.receive)
        receipt = {"images": digests, "options": options.model_dump(), "precision": self._precision}
        return self._content(request, classified, receipt)

    def _tell(self, tell: Tell, news: News) -> None:
        """Tell the client of an event stream what a step of its count brought."""
        match news:
            case FirstSeen():
                tell("first_pass", news.image, answers.first_pass_event(news, self._classes))
            case Standing():
                tell("tally", news.image, answers.tally_event(news))

    def _check_explained(self, images: np.ndarray) -> None:
        """Raise EvidenceWithheld or TooManyImages, before any work is done, if these are not explained here."""
        if self._evidence == "label":
            raise EvidenceWithheld("this service answers with labels only, and explains none: leave explain out")
        if len(images) > MAX_EXPLAINED:
            raise TooManyImages(
                f"explain=true takes at most {MAX_EXPLAINED} images, and this request has {len(images)}: send several "
                "requests, or leave it out"
            )

    def _explain(self, images: np.ndarray, classified: Classified) -> None:
        """Add to each prediction what its votes were cast on."""
        explanations = answers.explanations(images, classified.result, self._classes, self._spec)
        for prediction, explanation in zip(classified.predictions, explanations, strict=True):
            prediction["explanation"] = explanation

    async def _read(self, request: Request, model: type[Options]) -> tuple[np.ndarray, Options, float]:
        """Return the images and options of a request, and the seconds that reading them took once the body was here."""
        data = await request.body()
        began = time.monotonic()
        take_apart = partial(
            self._take_apart, model, request.headers.get("content-type", ""), request.scope["query_string"], data
        )
        sources, options = await self._intake.parse(take_apart, size=len(data), receive=request.receive)
        images = await self._intake.read(sources, options, size=len(data), receive=request.receive)
        return images, options, time.monotonic() - began

    def _take_apart(
        self, model: type[Options], content_type: str, query: bytes, data: bytes
    ) -> tuple[list[Source], Options]:
        body = bodies.parse(content_type, data, max_images=self._max_images, max_values=self._max_values)
        return body.sources, parse(model, query, body.options)

    def _content(
        self, request: Request, classified: Classified, receipt: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"predictions": classified.predictions, **(receipt or {}), **self._served}
        if classified.timings is not None:
            content["timings"] = classified.timings
        content["request_id"] = Exchange.of(request.scope).request_id
        return content


def _json(content: dict[str, Any]) -> Response:
    return Response(to_json(content), media_type="application/json")
