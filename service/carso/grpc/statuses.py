"""The gRPC status code of each error, by its HTTP status, so that one table decides what an error is."""

from __future__ import annotations

from grpc import StatusCode

from carso.errors import RequestError
from carso.http.statuses import STATUS

_CODES: dict[int, StatusCode] = {
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    405: StatusCode.UNIMPLEMENTED,
    408: StatusCode.ABORTED,
    409: StatusCode.FAILED_PRECONDITION,  # not ABORTED, which clients may send again
    413: StatusCode.INVALID_ARGUMENT,  # not RESOURCE_EXHAUSTED, which clients may send again
    415: StatusCode.INVALID_ARGUMENT,
    422: StatusCode.INVALID_ARGUMENT,
    429: StatusCode.RESOURCE_EXHAUSTED,
    431: StatusCode.INVALID_ARGUMENT,
    499: StatusCode.CANCELLED,
    500: StatusCode.INTERNAL,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}
CODE: dict[type[RequestError], StatusCode] = {kind: _CODES[status] for kind, status in STATUS.items()}
