"""What surrounds every request: its id, the API key, limits on its body, headers, errors, its metrics and its line in
the log.

This is pure ASGI middleware. So the application below sees the client hang up, and no body beyond the limit is held.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Collection, Iterable
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from carso.board.whole import Whole
from carso.complaints import shown
from carso.errors import BodyTooLarge, OriginRefused, Overloaded, RequestError, RequestTimeout, UnsupportedMediaType
from carso.http.exchange import Exchange, without_prefix
from carso.http.keys import ApiKeys
from carso.http.refusals import answer, as_request_error
from carso.http.statuses import STATUS
from carso.inference.engine import EngineStopped
from carso.telemetry.metrics import Metrics
from carso.telemetry.probes import PROBES, Lifecycle

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")

# A body of at most so many bytes is not counted among those in flight. uvicorn reads as much of each unasked. And a
# caller who fills the budget with large bodies, or announces them, does not block those who send one image.
SMALL_BODY = 64 * 2**10

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
)
_NO_CONTENT = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")


class Bodies:
    """The bytes that the bodies of all requests in flight have together, of every way in."""

    def __init__(self, limit: int, whole: Whole) -> None:
        """`limit`: of the `whole` service, in bytes."""
        self._limit = limit
        self._whole = whole
        self._held = whole.part("bodies")

    def hold(self, exchange: Exchange, size: int) -> None:
        """Count the body of a request as having `size` bytes from now on. Raises Overloaded."""
        more = size - exchange.body_bytes
        if size <= SMALL_BODY or more <= 0:
            return
        with self._whole.exclusive():
            held = int(sum(self._held.each()))
            if held + more > self._limit:
                raise Overloaded(
                    f"the bodies of other requests hold {held - exchange.body_bytes} bytes, this one has {size}, "
                    f"and at most {self._limit} are held together: send it again in 1 s, to another replica, or "
                    f"in several of at most {SMALL_BODY} bytes"
                )
            self._held.mine += more
        exchange.body_bytes = size

    def release(self, exchange: Exchange) -> None:
        """Count the body of a request no longer."""
        self._held.mine -= exchange.body_bytes
        exchange.body_bytes = 0


class Envelope:
    """ASGI middleware. The application below turns its errors into answers by `refusals.refuse`."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        bodies: Bodies,
        receive_timeout: float,
        keys: ApiKeys | None,
        keyless: Collection[str],
        endless: Collection[str],
        endpoints: Iterable[str],
        metrics: Metrics,
        lifecycle: Lifecycle,
        origins: Collection[str] = (),
    ) -> None:
        """`receive_timeout` is in seconds, for one body. The paths in `keyless` need no key. Those in `endless` bound
        their bodies themselves, which need not end. Metrics name the paths in `endpoints` and count all others as one,
        or callers could invent labels. `origins`: of the pages that may speak WebSocket, beside the service's own; "*":
        all.
        """
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._bodies = bodies
        self._receive_timeout = receive_timeout
        self._keys = keys
        self._keyless = keyless
        self._endless = endless
        self._endpoints = frozenset(endpoints)
        self._metrics = metrics
        self._lifecycle = lifecycle
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        exchange = begin(headers.get(b"x-request-id", b""), headers.get(b"traceparent", b""))
        exchange.host, _ = scope.get("client") or ("", 0)
        method: str = scope.get("method", "GET")  # that of a WebSocket, until it begins
        talks = scope["type"] == "websocket"
        if method == "HEAD":  # wherever there is GET; the server leaves out the body
            scope = {**scope, "method": "GET"}
        exchange.attach(scope)
        path = without_prefix(scope)
        send = _with_headers(send, exchange, closing=self._lifecycle.draining)
        try:
            if self._keys is not None and path not in self._keyless:
                exchange.caller = self._keys.check(headers.get(b"authorization", b""))
                if method == "POST" or talks:  # before a body is read: who has used up its rate costs little
                    exchange.caller.check()
            if talks:
                self._check_origin(headers)
            elif path in self._endless:
                _check_coding(headers)
            else:
                receive = self._limited(receive, headers, exchange)
            await self._app(scope, receive, send)
        except Exception as e:  # whatever no handler below has turned into an answer
            known = as_request_error(e)
            exchange.error = known.name
            if STATUS[type(known)] >= 500:
                log.exception("request failed", extra={"fields": {"request_id": exchange.request_id}})
            if not exchange.status:
                await answer(e, exchange.request_id, path=path)(scope, receive, send)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._lifecycle.draining or exchange.status or task is None:
                raise
            task.uncancel()  # by uvicorn, when the time to drain is over; it cancels once
            stopping = EngineStopped("the time to drain is over")
            exchange.error = as_request_error(stopping).name
            await answer(stopping, exchange.request_id, path=path)(scope, receive, send)
        finally:
            self._bodies.release(exchange)
            endpoint = path if path in self._endpoints else "other"
            level = logging.DEBUG if path in PROBES else logging.INFO
            account(self._metrics, exchange, endpoint=endpoint, method=method, level=level)

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """Raise OriginRefused for a page of another origin: browsers let any page speak to any host by WebSocket."""
        origin = headers.get(b"origin", b"").decode("latin-1")
        own = headers.get(b"host", b"").decode("latin-1")
        if origin and urlsplit(origin).netloc != own and not self._origins & {origin, "*"}:
            raise OriginRefused(
                f"pages of {shown(origin)} may not open streams here: ask the operator to name it in CARSO_CORS_ORIGINS"
            )

    def _limited(self, receive: Receive, headers: dict[bytes, bytes], exchange: Exchange) -> Receive:
        """Return a `receive` that takes no more of a body than is allowed, and waits no longer for it than is allowed.

        It raises BodyTooLarge and Overloaded before a byte is taken if the client states the size, and otherwise on
        the way; RequestTimeout; and UnsupportedMediaType for a compressed body.
        """
        limit = self._max_body_bytes
        length = headers.get(b"content-length", b"")
        stated = int(length) if length.isdigit() else 0
        taken = 0
        expires = asyncio.get_running_loop().time() + self._receive_timeout
        whole = False

        async def limited() -> Message:
            nonlocal taken, whole
            if whole:
                return await receive()
            if stated > limit:
                raise BodyTooLarge(f"the body has {stated} bytes, at most {limit} are allowed: send several requests")
            _check_coding(headers)
            self._bodies.hold(exchange, stated)
            try:
                async with asyncio.timeout_at(expires):
                    message = await receive()
            except TimeoutError:
                raise RequestTimeout(
                    f"{taken} bytes of the body came within {self._receive_timeout:g} s, and not its end: send it "
                    "faster, or send a smaller one"
                ) from None
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            taken += len(message.get("body", b""))
            if taken > limit:
                raise BodyTooLarge(f"the body has more than the {limit} bytes that are allowed: send several requests")
            self._bodies.hold(exchange, taken)
            return message

        return limited


def unread(metrics: Metrics, error: RequestError) -> bytes:
    """Return the whole answer to what the HTTP parser refuses; it is counted and logged like any other."""
    exchange = Exchange(request_id=_request_id(b""), status=STATUS[type(error)], error=error.name)
    response = answer(error, exchange.request_id)
    headers = (*response.raw_headers, *_HEADERS, _NO_CONTENT, (b"x-request-id", exchange.request_id.encode()))
    account(metrics, exchange, endpoint="other", method="", level=logging.INFO)
    status_line = f"HTTP/1.1 {exchange.status} {HTTPStatus(exchange.status).phrase}\r\n".encode()
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    return status_line + lines + b"\r\n" + bytes(response.body)


def _check_coding(headers: dict[bytes, bytes]) -> None:
    """Raise UnsupportedMediaType for a compressed body."""
    coding = headers.get(b"content-encoding", b"identity")
    if coding.lower() != b"identity":
        raise UnsupportedMediaType(
            f"Content-Encoding {shown(coding.decode('latin-1'))} is not supported: send the body uncompressed"
        )


def begin(request_id: bytes, traceparent: bytes) -> Exchange:
    """Return the exchange of a request that arrives now, with the id and the trace that its client gave, if any."""
    exchange = Exchange(request_id=_request_id(request_id))
    if trace := TRACEPARENT.fullmatch(traceparent):
        exchange.trace_id = trace[1].decode()
    return exchange


def account(metrics: Metrics, exchange: Exchange, *, endpoint: str, method: str, level: int) -> None:
    """Count an answer, and write its line in the log."""
    seconds = time.monotonic() - exchange.arrived
    metrics.request(endpoint=endpoint, status=exchange.status, seconds=seconds)
    if exchange.caller is not None:
        metrics.caller(exchange.caller.name, status=exchange.status, rows=exchange.rows)
    if exchange.error is not None:
        metrics.refusal(exchange.error)
    if log.isEnabledFor(level):
        fields = {
            "request_id": exchange.request_id,
            "method": method,
            "endpoint": endpoint,
            "status": exchange.status,
            "ms": round(1e3 * seconds, 3),
            **exchange.learnt(),
        }
        log.log(level, "request", extra={"fields": fields})


def _request_id(given: bytes) -> str:
    """Return the caller's id if it is well-formed and not long, else a fresh one, which need not be secret."""
    return given.decode() if REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


def _with_headers(send: Send, exchange: Exchange, *, closing: bool) -> Send:
    """Return a `send` that adds the headers of every answer. A page has a content security policy of its own.

    `closing` asks the client for a new connection then.
    """

    async def sender(message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
            exchange.status = message.get("status", HTTPStatus.SWITCHING_PROTOCOLS)
            own = message.get("headers", ())
            added = [*_HEADERS, (b"x-request-id", exchange.request_id.encode())]
            if all(name != _NO_CONTENT[0] for name, _ in own):
                added.append(_NO_CONTENT)
            if closing:
                added.append((b"connection", b"close"))
            message["headers"] = [*own, *added]
        await send(message)

    return sender
