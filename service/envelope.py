"""What surrounds every request: its id, the limit on its body, headers, errors, its metrics and its line in the log.

Pure ASGI, so that the application below sees the client hang up, and no body is held that is over the limit.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BodyTooLarge, answer, as_request_error
from service.metrics import Metrics
from service.server import Lifecycle

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


@dataclass(eq=False, slots=True)
class Exchange:
    """One request and its answer; in the handlers, `request.state.exchange`."""

    request_id: str
    arrived: float = field(default_factory=time.monotonic)
    code: int = 0  # 0: no answer was begun
    fields: dict[str, Any] = field(default_factory=dict)  # for the log


class Envelope:
    """ASGI middleware; the application under it is expected to turn its errors into answers by `refuse`."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        endpoints: Iterable[str],
        metrics: Metrics,
        lifecycle: Lifecycle,
    ) -> None:
        """`endpoints`: the paths that metrics name; all others are counted as one, or callers could invent labels."""
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._endpoints = frozenset(endpoints)
        self._metrics = metrics
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        exchange = Exchange(_request_id(headers.get(b"x-request-id", b"")))
        scope.setdefault("state", {})["exchange"] = exchange
        send = _with_headers(send, exchange, closing=self._lifecycle.draining)
        try:
            await self._app(scope, self._limited(receive, headers.get(b"content-length")), send)
        except Exception as e:  # whatever no handler expected: a fault of ours
            log.exception("request failed", extra={"fields": {"request_id": exchange.request_id}})
            if not exchange.code:
                await answer(e, exchange.request_id)(scope, receive, send)
        finally:
            self._account(scope, exchange)

    def _limited(self, receive: Receive, content_length: bytes | None) -> Receive:
        """`receive` that raises BodyTooLarge: before a byte is taken if the client states the size, else on the way."""
        limit = self._max_body_bytes
        stated = int(content_length) if content_length and content_length.isdigit() else 0
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            if stated > limit:
                raise BodyTooLarge(f"the body has {stated} bytes, at most {limit} are taken: send several requests")
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > limit:
                    raise BodyTooLarge(
                        f"the body has more than the {limit} bytes that are taken: send several requests"
                    )
            return message

        return limited

    def _account(self, scope: Scope, exchange: Exchange) -> None:
        seconds = time.monotonic() - exchange.arrived
        path: str = scope["path"]
        endpoint = path if path in self._endpoints else "other"
        self._metrics.request(endpoint=endpoint, code=exchange.code, seconds=seconds)
        if error := exchange.fields.get("error"):
            self._metrics.refusal(error)
        if log.isEnabledFor(logging.INFO):
            fields = {
                "request_id": exchange.request_id,
                "method": scope["method"],
                "endpoint": endpoint,
                "code": exchange.code,
                "ms": round(1e3 * seconds, 3),
                **exchange.fields,
            }
            log.info("request", extra={"fields": fields})


async def refuse(request: Request, error: Exception) -> Response:
    """The exception handler of the application."""
    exchange: Exchange = request.state.exchange
    exchange.fields["error"] = as_request_error(error).name
    return answer(error, exchange.request_id)


def _request_id(given: bytes) -> str:
    """The caller's, if it is well-formed and not long; else a fresh one."""
    return given.decode() if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def _with_headers(send: Send, exchange: Exchange, *, closing: bool) -> Send:
    """`closing`: tell the client to use another connection next time."""

    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            exchange.code = message["status"]
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-request-id", exchange.request_id.encode()),
                (b"x-content-type-options", b"nosniff"),
            ]
            if closing:
                message["headers"].append((b"connection", b"close"))
        await send(message)

    return sender
