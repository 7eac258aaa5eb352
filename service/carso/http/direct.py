"""A short way to the endpoints that take their requests apart themselves."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from carso.http.exchange import Exchange, Handler, without_prefix
from carso.http.refusals import EXPECTED, refuse


class Direct:
    """ASGI middleware that hands a POST to its endpoint, and all else to the application.

    The application's own way leads through its layers of middleware, past its routes one after the other, and through
    contexts for what an endpoint may depend on. The endpoints here depend on nothing, so they are spared all this,
    which takes time of the event loop.
    """

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, Handler]) -> None:
        """`endpoints` by path, without a prefix."""
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        posts = scope["type"] == "http" and scope["method"] == "POST"
        endpoint = self._endpoints.get(without_prefix(scope)) if posts else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            response = await endpoint(request)
            await response(scope, receive, send)
        except EXPECTED as e:
            if Exchange.of(scope).status:  # an answer was begun
                raise
            response = await refuse(request, e)
            await response(scope, receive, send)
