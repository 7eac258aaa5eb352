"""What surrounds every call: its id, the API key, errors as status codes, its metrics and its line in the log.

It is for gRPC what carso.http.envelope is for HTTP, and counts and logs a call in the same words: its status is the one
that HTTP would have given.
"""

from __future__ import annotations

import asyncio
import logging
from typing import NoReturn
from urllib.parse import unquote

import grpc
from starlette.requests import Request
from starlette.types import Message as AsgiMessage

from carso.errors import ClientGone, DeadlineExceeded, Overloaded, RequestError
from carso.grpc.protocol import METHODS, SERVICE, Message, Method
from carso.grpc.statuses import CODE
from carso.http.envelope import Bodies, account, begin
from carso.http.exchange import Exchange
from carso.http.keys import ApiKeys
from carso.http.refusals import noted
from carso.http.statuses import STATUS
from carso.telemetry.metrics import Metrics

INFER = "ModelInfer"
PROBES = frozenset(("ServerLive", "ServerReady"))  # they need no key, and are logged at level debug
REQUEST_ID, RETRY_AFTER = "x-request-id", "retry-after"  # metadata of an answer


class Calls:
    """Makes gRPC's handlers out of what the service does."""

    def __init__(self, *, keys: ApiKeys | None, bodies: Bodies, metrics: Metrics) -> None:
        """`bodies`: bounds the bytes of all requests in flight."""
        self._keys = keys
        self._bodies = bodies
        self._metrics = metrics

    def handler(self, name: str, method: Method) -> grpc.RpcMethodHandler:
        """Return what gRPC calls for a method of the protocol."""
        request, response = METHODS[name]

        async def call(message: Message, context: grpc.aio.ServicerContext) -> Message:
            return await self._call(name, method, message, context)

        return grpc.unary_unary_rpc_method_handler(call, request.FromString, response.SerializeToString)

    async def _call(self, name: str, method: Method, message: Message, context: grpc.aio.ServicerContext) -> Message:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        exchange = begin(metadata.get(REQUEST_ID, "").encode(), metadata.get("traceparent", "").encode())
        exchange.host = _host(context.peer())
        try:
            if self._keys is not None and name not in PROBES:
                exchange.caller = self._keys.check(metadata.get("authorization", "").encode())
                if name == INFER:
                    exchange.caller.check()
            self._bodies.hold(exchange, message.ByteSize())
            answer = await method(message, _as_request(exchange), context)
            exchange.status = 200
            context.set_trailing_metadata(((REQUEST_ID, exchange.request_id),))
            return answer
        except asyncio.CancelledError:  # gRPC cancels what it need not answer any more
            left = context.time_remaining()
            reason = DeadlineExceeded if left is not None and left <= 0 else ClientGone
            exchange.status, exchange.error = STATUS[reason], reason.name
            if name == INFER:
                self._metrics.cancellation("deadline" if reason is DeadlineExceeded else "client_gone")
            raise
        except Exception as e:
            await self._refuse(noted(e, exchange), exchange, context)
        finally:
            self._bodies.release(exchange)
            level = logging.DEBUG if name in PROBES else logging.INFO
            account(self._metrics, exchange, endpoint=f"/{SERVICE}/{name}", method="gRPC", level=level)

    async def _refuse(self, error: RequestError, exchange: Exchange, context: grpc.aio.ServicerContext) -> NoReturn:
        exchange.status = STATUS[type(error)]
        trailing = [(REQUEST_ID, exchange.request_id)]
        if isinstance(error, Overloaded):
            trailing.append((RETRY_AFTER, str(error.retry_after)))
        await context.abort(CODE[type(error)], f"{error.name}: {error}", tuple(trailing))
        raise AssertionError("abort raises")


def _host(peer: str) -> str:
    """Return the address of a peer, which gRPC writes as ipv4:127.0.0.1:50051 or ipv6:%5B::1%5D:50051."""
    kind, _, address = unquote(peer).partition(":")
    return address.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else peer


def _as_request(exchange: Exchange) -> Request:
    """Return the call as the application below knows requests. It is told of no client that hangs up: gRPC cancels."""
    scope = {"type": "http"}
    exchange.attach(scope)
    return Request(scope, _never)


async def _never() -> AsgiMessage:
    never: asyncio.Future[AsgiMessage] = asyncio.get_running_loop().create_future()
    return await never
