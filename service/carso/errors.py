"""What can go wrong with a request: one exception type per thing that a caller can do something about.

Raised where the fact is known, turned into an HTTP answer by `answer` below and nowhere else. The message says what was
wrong, with the value, and what to do. The name in the answer is the class's own in snake case: WrongShape is
``wrong_shape``.
"""

# ruff: noqa: N818  the names are part of the answers, and each says what is wrong

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from carso.inference.admission import QueueFull
from carso.inference.engine import EngineDead, EngineError, EngineStopped


class RequestError(Exception):
    """A request that gets another answer than the one it asked for."""

    status: ClassVar[int]
    name: ClassVar[str]
    headers: Mapping[str, str]  # of the answer

    def __init_subclass__(cls, *, status: int, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        cls.headers = headers
        cls.status = status
        cls.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


class UndecodableImage(RequestError, status=400):
    """An encoded image that is damaged, truncated, or none of the formats read here."""


class UndecodableJson(RequestError, status=400):
    """A body that is not JSON."""


class UndecodableBase64(RequestError, status=400):
    """A string among `images` that is not base64."""


class UndecodableNpy(RequestError, status=400):
    """A body that is not a whole .npy file, and nothing but one."""


class UndecodableMultipart(RequestError, status=400):
    """A multipart body that is damaged or truncated."""


class MalformedRequest(RequestError, status=400, headers={"connection": "close"}):
    """Bytes that are no HTTP request."""


class Unauthorized(RequestError, status=401, headers={"www-authenticate": "Bearer"}):
    """No API key, or an unknown one."""


class SeedRefused(RequestError, status=403):
    """The operator does not let callers choose the seed."""


class NotFound(RequestError, status=404):
    """No such path."""


class MethodNotAllowed(RequestError, status=405):
    """The path exists, for another method."""


class RequestTimeout(RequestError, status=408, headers={"connection": "close"}):
    """The client took too long to send its body."""


class BodyTooLarge(RequestError, status=413):
    """More bytes than the service takes."""


class TooManyImages(RequestError, status=413):
    """More images in one request than the service takes."""


class TooManyPixels(RequestError, status=413):
    """Encoded images that would decode to more pixels than the service takes in one request."""


class UnsupportedMediaType(RequestError, status=415):
    """A Content-Type that is not read here, or none."""


class HeadTooLarge(RequestError, status=431, headers={"connection": "close"}):
    """A request line, headers or trailers without end."""


class WrongShape(RequestError, status=422):
    """An image of another shape than the bundle's."""


class NotFinite(RequestError, status=422):
    """NaN or infinity among the values."""


class OutOfRange(RequestError, status=422):
    """A value outside the bundle's range."""


class EmptyBatch(RequestError, status=422):
    """No image, or an image without pixels."""


class RaggedArray(RequestError, status=422):
    """Nested lists of unequal lengths."""


class NotNumbers(RequestError, status=422):
    """Something else than numbers where the values of an image should be."""


class ObjectArray(RequestError, status=422):
    """A .npy file of Python objects: it holds a pickle, and a pickle runs code."""


class UnsupportedDtype(RequestError, status=422):
    """A .npy file of another type than floating point or uint8."""


class TransparentImage(RequestError, status=422):
    """An image with pixels that let a background show through."""


class AnimatedImage(RequestError, status=422):
    """An image file of several frames."""


class UnexpectedPart(RequestError, status=422):
    """A multipart part that is not a file in the field `file`."""


class MissingImages(RequestError, status=422):
    """A JSON body without a list `images`."""


class InvalidTensor(RequestError, status=422):
    """A request of the Open Inference Protocol whose parts do not fit it, or each other."""


class UnknownOutput(RequestError, status=422):
    """An output that this model does not have."""


class UnknownParameter(RequestError, status=422):
    """An option that this endpoint does not have."""


class InvalidParameter(RequestError, status=422):
    """An option whose value is outside its range."""


class ConflictingParameters(RequestError, status=422):
    """One option given twice, with different values."""


class Overloaded(RequestError, status=429):
    """More work is owed already than the service takes on."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:  # seconds
        super().__init__(message)
        self.headers = {"retry-after": str(retry_after)}


class ClientGone(RequestError, status=499):
    """The client hung up; nobody reads this answer, but the log and the metrics count it."""


class InternalError(RequestError, status=500):
    """A fault of the service."""


class EngineFailed(RequestError, status=500):
    """The engine has failed while it had this request."""


class NotReady(RequestError, status=503, headers={"retry-after": "1"}):
    """The service takes no work now."""


class DeadlineExceeded(RequestError, status=504):
    """The deadline passed before a vote was cast for every image."""


def as_request_error(error: Exception) -> RequestError:
    """What a caller is told about `error`; never more than its own type allows."""
    match error:
        case RequestError():
            return error
        case ClientDisconnect():
            return ClientGone("the client closed the connection before the body was complete")
        case QueueFull():
            return Overloaded(str(error), retry_after=math.ceil(error.wait))
        case EngineStopped():
            return NotReady("the service is stopping: send this request again, to another replica if any")
        case EngineDead():
            return NotReady("the engine of this process is dead: send this request again, to another replica if any")
        case EngineError():
            return EngineFailed(
                "the engine failed before this request was done: send it again, to another replica if any"
            )
        case HTTPException(status_code=404):
            return NotFound("there is nothing at this path; GET /docs lists what there is")
        case HTTPException(status_code=405):
            allowed = (error.headers or {}).get("Allow", "another method")
            return MethodNotAllowed(f"this path takes {allowed} only")
        case _:
            return InternalError("the service failed on this request; its log has the details under the request id")


def answer(error: Exception, request_id: str, *, path: str = "") -> Response:
    """The one shape of every error: `error`, `message`, `request_id`.

    Below /v2 it is that of the Open Inference Protocol, whose clients show `error` and nothing else.
    """
    shown = as_request_error(error)
    content = {"error": shown.name, "message": str(shown), "request_id": request_id}
    if path.startswith("/v2/"):
        content["error"] = f"{shown.name}: {shown}"
    allow = {"allow": error.headers["Allow"]} if isinstance(error, HTTPException) and error.headers else {}
    return Response(to_json(content), shown.status, {**shown.headers, **allow}, "application/json")
