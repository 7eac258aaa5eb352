"""One call to the service, without any I/O: its requests, its answer, and when to try again.

Whoever sends and sleeps (carso.client.clients) takes `request()`, sends it, and gives what came of it to `judge()`,
until that returns a result or raises. Classification is idempotent, so a request whose connection broke is sent again
even if the service may have worked on it.
"""

from __future__ import annotations

import json
import math
import random
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from carso.client import events
from carso.client.errors import CarsoError, DeadlineExceeded, RequestRefused, Unavailable, UnexpectedAnswer
from carso.client.images import Body
from carso.complaints import first_complaint

CONNECT_TIMEOUT = 5.0  # seconds, at most: a connection is made at once, or hardly ever
GRACE = 1.0  # seconds after a deadline that the service knows, in which its answer with the votes so far may arrive
MAX_DEADLINE = 600.0  # seconds, the most that the service takes
FIRST_BACKOFF, MAX_BACKOFF = 0.1, 5.0  # seconds

# A connection that was refused or that broke. Timeouts are not among them: more requests do not help a slow service.
_BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)

R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a call waits. `deadline` and `timeout` in seconds."""

    timeout: float  # for each wait on the socket; without a deadline, also the longest Retry-After that is obeyed
    retries: int
    deadline: float | None = None  # from the beginning of the call, for everything
    tell: bool = False  # whether the service is told the deadline, so that it answers by then with what it has


class Call(Generic[R]):
    """One call and its attempts. Its clock starts when it is made."""

    def __init__(
        self,
        build: Callable[..., httpx.Request],
        method: str,
        path: str,
        *,
        model: type[R],
        patience: Patience,
        params: Mapping[str, object] | None = None,
        body: Body | None = None,
        accept: str = "*/*",
        via: str = "",
    ) -> None:
        """`build`: an httpx client's build_request. `model`: the answer's. `params` that are None are left out.
        `accept`: the media type of the answer. `via`: the proxy in words, for error messages."""
        self.request_id = secrets.token_hex(16)
        self._build = build
        self._method, self._path = method, path
        self._model = model
        self._patience = patience
        self._params = {name: value for name, value in (params or {}).items() if value is not None}
        self._body = body
        self._accept = accept
        self._via = f" {via}" if via else ""
        self._end = None if patience.deadline is None else time.monotonic() + patience.deadline
        self._attempts = 0

    def left(self) -> float | None:
        """Return the seconds until this attempt must be over; None: it may take forever."""
        if self._end is None:
            return None
        return max(0.0, self._end - time.monotonic()) + (GRACE if self._patience.tell else 0.0)

    def request(self) -> httpx.Request:
        """Build the request of the next attempt. Raises DeadlineExceeded."""
        headers = {"x-request-id": self.request_id, "accept": self._accept}
        params: dict[str, Any] = dict(self._params)
        timeout = self._patience.timeout
        if self._end is not None:
            # not <=: a deadline of NaN is over too
            if not (left := self._end - time.monotonic()) > 0:
                raise self._too_late()
            if self._patience.tell:
                told = min(left, MAX_DEADLINE)
                params["deadline_ms"] = max(1, int(1e3 * told))
                timeout = told + GRACE  # not the timeout of other calls: a count may take longer
            else:
                timeout = min(timeout, left)
        if self._body is not None:
            headers["content-type"] = self._body.content_type
        return self._build(
            self._method,
            self._path,
            params=params,
            headers=headers,
            content=self._body.content if self._body else None,
            timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT)),
        )

    def judge(self, outcome: httpx.Response | httpx.RequestError) -> R | float:
        """Return the result of the call, or the seconds to sleep before its next request. Raises CarsoError.

        `outcome`: what came of the last request.
        """
        self._attempts += 1
        if isinstance(outcome, httpx.Response):
            if outcome.is_success:
                return self._read(outcome)
            error, again = self._refusal(outcome), outcome.status_code in (429, 503)
        else:
            error, again = self._failure(outcome), isinstance(outcome, _BROKEN)
        if again and self._attempts <= self._patience.retries:
            pause = self._pause(error.retry_after)
            if pause is not None:
                return pause
        raise error from (None if isinstance(outcome, httpx.Response) else outcome)

    def check_streams(self, response: httpx.Response) -> None:
        """Raise UnexpectedAnswer unless a 2xx answer brings events."""
        if not response.headers.get("content-type", "").startswith(events.MEDIA_TYPE):
            raise UnexpectedAnswer(
                f"{response.url} does not answer with events: it is not a CARSO service, or an older one",
                request_id=self.request_id,
                status=response.status_code,
            )

    def read(self, reader: events.Reader, line: str, response: httpx.Response) -> events.Event | None:
        """Return the event that a line of an answer ends. Raises CarsoError."""
        try:
            return reader.event_at(line)
        except events.Told as e:
            raise self._error_of(e.content, response) from None
        except ValidationError as e:
            raise self._unexpected(e, response) from None

    def cut_off(self, error: httpx.RequestError | None, response: httpx.Response) -> CarsoError:
        """Make the error of events that ended without an answer, by `error` or by themselves."""
        if error is not None:
            return self._failure(error)
        return Unavailable(f"{response.url} ended its events without an answer{self._via}", request_id=self.request_id)

    def _pause(self, retry_after: float | None) -> float | None:
        """Return the seconds until the next attempt, or None if the call cannot wait that long.

        Exponential backoff with full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
        It is added to what the service asks for, so that clients that were told the same do not all return at once.
        """
        backoff = min(MAX_BACKOFF, FIRST_BACKOFF * 2.0 ** min(self._attempts - 1, 30))
        pause = (retry_after or 0.0) + random.uniform(0, backoff)  # noqa: S311
        if self._end is not None:
            return pause if time.monotonic() + pause < self._end else None
        return pause if retry_after is None or retry_after <= self._patience.timeout else None

    def _read(self, response: httpx.Response) -> R:
        try:
            return self._model.model_validate_json(response.content)
        except ValidationError as e:
            raise self._unexpected(e, response) from None

    def _unexpected(self, error: ValidationError, response: httpx.Response) -> UnexpectedAnswer:
        return UnexpectedAnswer(
            f"{response.url} does not answer as a CARSO service does ({first_complaint(error)}): is the URL right?",
            request_id=self.request_id,
            status=response.status_code,
        )

    def _refusal(self, response: httpx.Response) -> CarsoError:
        """Make the error of an answer that is not 2xx."""
        return self._error(response.status_code, *self._told(response), response)

    def _error_of(self, told: str, response: httpx.Response) -> CarsoError:
        """Make the error that a service told in an event."""
        try:
            content = json.loads(told)
            name, message, request_id = (str(content[key]) for key in ("error", "message", "request_id"))
            return self._error(int(content["status"]), name, message, request_id, response)
        except (ValueError, TypeError, KeyError):
            return UnexpectedAnswer(
                f"{response.url} ends its events with an error that cannot be read: {told[:200]!r}",
                request_id=self.request_id,
                status=response.status_code,
            )

    def _error(
        self, status: int, name: str | None, message: str, request_id: str, response: httpx.Response
    ) -> CarsoError:
        if status in (429, 503):
            retry_after = seconds_of(response.headers.get("retry-after"))
            return Unavailable(message, request_id=request_id, status=status, error=name, retry_after=retry_after)
        if status == 504:
            return DeadlineExceeded(message, request_id=request_id, status=status, error=name)
        kind = RequestRefused if 400 <= status < 500 else UnexpectedAnswer
        return kind(message, request_id=request_id, status=status, error=name)

    def _told(self, response: httpx.Response) -> tuple[str | None, str, str]:
        """Return name, message and request id; of an answer in another shape, such as a proxy's, what there is."""
        try:
            content = response.json()
            return str(content["error"]), str(content["message"]), str(content["request_id"])
        except (ValueError, TypeError, KeyError):
            return None, f"{response.url} answers {status_line(response)}{self._via}", self.request_id

    def _failure(self, error: httpx.RequestError) -> CarsoError:
        """Make the error of a request that got no answer."""
        url = error.request.url
        if isinstance(error, httpx.TimeoutException):
            if self._end is not None and time.monotonic() >= self._end:
                return self._too_late()
            if isinstance(error, httpx.ConnectTimeout):
                message = f"no connection to {url} in time{self._via}"
            elif isinstance(error, httpx.PoolTimeout):
                message = f"no free connection to {url} in time: make fewer calls at once, or allow more connections"
            else:
                message = f"no answer from {url} in time{self._via}: give a longer timeout, or a deadline"
            return Unavailable(message, request_id=self.request_id)
        reason = str(error) or type(error).__name__
        return Unavailable(f"no answer from {url}{self._via}: {reason}", request_id=self.request_id)

    def _too_late(self) -> DeadlineExceeded:
        tries = f"{self._attempts} attempt{'' if self._attempts == 1 else 's'}"
        return DeadlineExceeded(
            f"no answer within the deadline of {self._patience.deadline:g} s, after {tries}", request_id=self.request_id
        )


def seconds_of(retry_after: str | None) -> float | None:
    """Read Retry-After, which holds seconds or an HTTP date. None if it cannot be read."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = parsedate_to_datetime(retry_after)
        except ValueError:
            return None
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def status_line(response: httpx.Response) -> str:
    """Write the status as: 502 Bad Gateway."""
    return f"{response.status_code} {response.reason_phrase}".strip()
