"""One request and its answer: what the envelope, the endpoints and the log know of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Mapping, MutableMapping
from dataclasses import dataclass, field
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import Response

from carso.http.keys import Caller

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
"""What takes a request apart itself, and answers it."""

_KEY = "carso.exchange"
# Extensions of the ASGI scope, by our own protocol: calls that let a body take any time, and that cut the connection.
UNTIMED, ABORT = "carso.untimed", "carso.abort"


@dataclass(eq=False, slots=True, kw_only=True)
class Exchange:
    """The envelope makes it and attaches it to the request's ASGI scope; whoever learns something fills it in."""

    request_id: str
    arrived: float = field(default_factory=time.monotonic)
    status: int = 0  # HTTP status of the answer; 0: no answer was begun
    body_bytes: int = 0  # of its body, as far as they count towards the bodies in flight
    caller: Caller | None = None  # whose key the request has; None: the service asks for none, or it has no valid one
    host: str = ""  # the address that it came from; empty: unknown
    rows: int = 0  # of work, which the caller is charged for
    trace_id: str | None = None
    error: str | None = None  # its name
    images: int | None = None
    labels: list[int] | None = None
    votes: int | None = None  # cast for all images
    agree: int | None = None  # images on which both paths agree
    near_duplicates: int | None = None  # images that are nearly earlier ones; None: nobody looked
    timings: dict[str, float] | None = None  # in milliseconds

    def attach(self, scope: MutableMapping[str, Any]) -> None:
        """Make this the exchange of a request."""
        scope[_KEY] = self

    @classmethod
    def of(cls, scope: Mapping[str, Any]) -> Exchange:
        """Return the exchange of a request that came through the envelope. Raises KeyError for any other."""
        return cast("Exchange", scope[_KEY])

    @property
    def sender(self) -> str:
        """Who sent it, as far as that is known: the name of the key; without keys, the address, of which IPv6 gives
        each customer a network of 64 bits.
        """
        if self.caller is not None:
            return self.caller.name
        try:
            address = ip_address(self.host)
        except ValueError:  # a socket that is none of the network's
            return self.host
        if isinstance(address, IPv6Address):
            return str(address.ipv4_mapped or IPv6Network((int(address) >> 64 << 64, 64)))
        return str(address)

    def charge(self, rows: int) -> None:
        """Charge the caller for work before it is done. Raises Overloaded."""
        if self.caller is not None:
            self.caller.take(rows)
            self.rows += rows

    def settle(self, rows: int) -> None:
        """Charge the caller for what the work has cost beyond that; a negative number gives back."""
        if self.caller is not None:
            self.caller.settle(rows)
            self.rows += rows

    def learnt(self) -> dict[str, object]:
        """Return, by name, what the log says of the request beyond its line and its status."""
        names = ("trace_id", "error", "images", "labels", "votes", "agree", "near_duplicates", "timings")
        known = {name: value for name in names if (value := getattr(self, name)) is not None}
        return known if self.caller is None else {"caller": self.caller.name, **known}


def without_prefix(scope: Mapping[str, Any]) -> str:
    """Return the path of a request below CARSO_ROOT_PATH, whether or not the proxy in front has cut that off."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path
