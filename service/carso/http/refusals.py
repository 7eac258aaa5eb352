"""From errors to HTTP answers."""

from __future__ import annotations

import logging
import math

from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from carso import errors
from carso.errors import RequestError
from carso.http.exchange import Exchange, without_prefix
from carso.http.statuses import STATUS
from carso.inference.admission import QueueFull
from carso.inference.engine import EngineDead, EngineError, EngineStopped

log = logging.getLogger(__name__)

# What requests may end in without a fault of the service's own
EXPECTED = (RequestError, EngineError, QueueFull, ClientDisconnect, HTTPException)

_CLOSING = {"connection": "close"}  # what follows on the connection cannot be trusted
_HEADERS: dict[type[RequestError], dict[str, str]] = {
    errors.MalformedRequest: _CLOSING,
    errors.RequestTimeout: _CLOSING,
    errors.HeadTooLarge: _CLOSING,
    errors.Unauthorized: {"www-authenticate": "Bearer"},
    errors.NotReady: {"retry-after": "1"},
}


def as_request_error(error: Exception) -> RequestError:
    """Return what a caller is told about `error`; never more than its own type allows."""
    match error:
        case RequestError():
            return error
        case ClientDisconnect():
            return errors.ClientGone("the client closed the connection before the body was complete")
        case QueueFull():
            return errors.Overloaded(str(error), retry_after=math.ceil(error.wait))
        case EngineStopped():
            return errors.NotReady("the service is stopping: send this request again, to another replica if any")
        case EngineDead():
            return errors.NotReady(
                "the engine of this process is dead: send this request again, to another replica if any"
            )
        case EngineError():
            return errors.EngineFailed(
                "the engine failed before this request was done: send it again, to another replica if any"
            )
        case HTTPException(status_code=404):
            return errors.NotFound("there is nothing at this path; GET /docs lists what there is")
        case HTTPException(status_code=405):
            allowed = _allowed(error) or "another method"
            return errors.MethodNotAllowed(f"this path takes {allowed} only")
        case _:
            return errors.InternalError(
                "the service failed on this request; its log has the details under the request id"
            )


def noted(error: Exception, exchange: Exchange) -> RequestError:
    """Note that a request ended in `error`, and return what a caller is told. The log has what that does not tell."""
    shown = as_request_error(error)
    exchange.error = shown.name
    if isinstance(shown, errors.InternalError):
        log.error("request failed", exc_info=error, extra={"fields": {"request_id": exchange.request_id}})
    return shown


def answer(error: Exception, request_id: str, *, path: str = "") -> Response:
    """Return the answer to a request that ended in `error`. Its JSON is `error`, `message`, `request_id`.

    Below /v2 it has the form of the Open Inference Protocol, whose clients show `error` and nothing else.
    """
    shown = as_request_error(error)
    content = {"error": shown.name, "message": str(shown), "request_id": request_id}
    if path.startswith("/v2/"):
        content["error"] = f"{shown.name}: {shown}"
    headers = dict(_HEADERS.get(type(shown), {}))
    if isinstance(shown, errors.Overloaded):
        headers["retry-after"] = str(shown.retry_after)
    if isinstance(error, HTTPException) and error.headers:
        headers["allow"] = _allowed(error)
    return Response(to_json(content), STATUS[type(shown)], headers, "application/json")


def event(error: Exception, exchange: Exchange) -> dict[str, object]:
    """Note that a request ended in `error` after its answer had begun, and return what the client is told of it."""
    shown = noted(error, exchange)
    return {
        "error": shown.name,
        "message": str(shown),
        "status": STATUS[type(shown)],
        "request_id": exchange.request_id,
    }


def _allowed(error: HTTPException) -> str:
    """Return the methods that a path takes: HEAD wherever it takes GET."""
    allowed = (error.headers or {}).get("Allow", "")
    return "GET, HEAD" if allowed == "GET" else allowed


async def refuse(request: Request, error: Exception) -> Response:
    """Answer a request that ended in `error`: the exception handler of the application."""
    exchange = Exchange.of(request.scope)
    noted(error, exchange)
    return answer(error, exchange.request_id, path=without_prefix(request.scope))


async def fail(request: Request, error: Exception) -> Response:
    """Answer a request that failed. Starlette raises its error again, and the envelope logs it."""
    return answer(error, Exchange.of(request.scope).request_id, path=without_prefix(request.scope))
