"""What a call may end with instead of a result: one exception type per thing that a caller can do something about."""

# ruff: noqa: N818  each name says what is wrong

from __future__ import annotations


class CarsoError(Exception):
    """Any of the below. `str` of it says all that a log needs."""

    def __init__(
        self,
        message: str,
        *,
        request_id: str = "",
        status: int | None = None,
        error: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """`request_id`: what the service's log has of this call. `status`: of the HTTP answer, None if there was none.
        `error`: the service's name for what is wrong, such as wrong_shape. `retry_after`: seconds that it asked to
        wait, if it did."""
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.status = status
        self.error = error
        self.retry_after = retry_after

    def __str__(self) -> str:
        name = f"{self.error}: " if self.error else ""
        status = f"HTTP {self.status}, " if self.status else ""
        return f"{name}{self.message} ({status}request {self.request_id})"


class RequestRefused(CarsoError):
    """4xx other than 429: the same request would be refused again."""


class Unavailable(CarsoError):
    """No connection, no answer within the timeout, or 429 or 503 after all retries: later, or elsewhere, it may do."""


class DeadlineExceeded(CarsoError):
    """The deadline passed without an answer: so says the service (504), or the client's own clock (no status)."""


class UnexpectedAnswer(CarsoError):
    """A fault of the service (500), or an answer that is none of its own: most likely the URL is another server's."""
