"""The native API: /classify and /classify/fast."""

from __future__ import annotations

import numpy as np
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from carso.api import answers
from carso.api.classification import Classified, Classifier
from carso.bundle import Bundle
from carso.http.offload import Decoder
from carso.images import bodies, json_values
from carso.images.reader import Source
from carso.options import FastOptions, Options, RobustOptions, parse


class Native:
    """Its endpoints."""

    def __init__(
        self,
        classifier: Classifier,
        decoder: Decoder,
        bundle: Bundle,
        robust_options: type[RobustOptions],
        *,
        provider: str,
        max_images: int,
    ) -> None:
        """`robust_options`: with this service's limits."""
        self._classifier = classifier
        self._decoder = decoder
        self._max_images = max_images
        self._max_values = json_values.limit(bundle.manifest.input.shape)
        self._robust_options = robust_options
        self._served = {"bundle": answers.bundle_name(bundle), "provider": provider}

    async def fast(self, request: Request) -> Response:
        """The fast path: the first pass only."""
        self._classifier.check("fast")
        images, _, decode = await self._read(request, FastOptions)
        return self._answer(request, await self._classifier.fast(request, images, decode=decode))

    async def robust(self, request: Request) -> Response:
        """The robust path: both passes."""
        self._classifier.check("robust")
        images, options, decode = await self._read(request, self._robust_options)
        return self._answer(request, await self._classifier.robust(request, images, options, decode=decode))

    def _answer(self, request: Request, classified: Classified) -> Response:
        content = {"predictions": classified.predictions, **self._served}
        if classified.timings is not None:
            content["timings"] = classified.timings
        content["request_id"] = request.state.exchange.request_id
        return Response(to_json(content), media_type="application/json")

    async def _read(self, request: Request, model: type[Options]) -> tuple[np.ndarray, Options, float]:
        content_type = request.headers.get("content-type", "")
        query: bytes = request.scope["query_string"]
        data = await request.body()

        def take_apart() -> tuple[list[Source], Options]:
            body = bodies.parse(content_type, data, max_images=self._max_images, max_values=self._max_values)
            return body.sources, parse(model, query, body.options)

        return await self._decoder.decode(len(data), take_apart, request.receive)
