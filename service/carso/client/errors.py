"""The errors of a call: one exception type for each thing that a caller can do something about.

CarsoError
├── RequestRefused      the same request would be refused again: change it
├── Unavailable         no connection, no answer, or too much work: try later, or elsewhere
├── DeadlineExceeded    your own deadline passed: give more time
├── UnexpectedAnswer    a fault of the service, or the URL of another server
└── UnusableVariable    HTTP_PROXY, SSL_CERT_FILE or the like: mend it

from carso import Client, RequestRefused, Unavailable

with Client() as client:
    try:
        result = client.classify("digit.png", deadline=2)
    except RequestRefused as e:
        print("not an image for this service:", e.error, e.message)
    except Unavailable as e:
        print("try again in", e.retry_after, "seconds")
"""

# ruff: noqa: N818  each name says what is wrong

from __future__ import annotations


class CarsoError(Exception):
    """Any error of a call. `str` of it says all that a log needs.

    `message`: what was wrong and what to do. `request_id`: what the service's log has of this call. `status`: the HTTP
    status of the answer, None if there was none. `error`: the service's name for what is wrong, such as wrong_shape.
    `retry_after`: the seconds that the service asked to wait, if it did.
    """

    def __init__(
        self,
        message: str,
        *,
        request_id: str = "",
        status: int | None = None,
        error: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.status = status
        self.error = error
        self.retry_after = retry_after

    def __str__(self) -> str:
        name = f"{self.error}: " if self.error else ""
        status = f"HTTP {self.status}, " if self.status else ""
        return f"{name}{self.message}" + (f" ({status}request {self.request_id})" if self.request_id else "")


class RequestRefused(CarsoError):
    """A 4xx status other than 429: the same request would be refused again."""


class Unavailable(CarsoError):
    """No connection, no answer within the timeout, or 429 or 503 after all retries. Try later, or another replica."""


class DeadlineExceeded(CarsoError):
    """The deadline passed without an answer. The service says so (504), or the client's own clock (no status)."""


class UnusableVariable(CarsoError):
    """A variable of the environment names a proxy or certificates that cannot be used. A client raises it when it is
    made."""


class UnexpectedAnswer(CarsoError):
    """A fault of the service (500), or an answer that no CARSO service gives: the URL may be another server's."""
