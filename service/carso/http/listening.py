"""The sockets that the server listens on: opened before the bundle is loaded, so that a taken port is known at once."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Sequence

from carso.settings import option, variable

EVERYWHERE = "::"  # every address of both families
_NO_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)  # this system has no address of that kind
_REASONS = {
    errno.EADDRINUSE: "another process listens there: stop it, or choose another port ({setting})",
    errno.EADDRNOTAVAIL: "this machine does not have that address (CARSO_HOST or --host)",
    errno.EACCES: "this user may not open that port: choose one from 1024 ({setting})",
}


class UnknownHost(Exception):  # noqa: N818  of a setting, not of the program
    """The host is neither an address nor a name that can be resolved."""


class CannotListen(Exception):  # noqa: N818
    """The system does not let the service listen at an address. The message names the address and the reason."""


def bind(host: str, port: int, *, setting: str = "port") -> list[socket.socket]:
    """Bind sockets to every address of `host` at `port`, without listening yet. Port 0 is any port that is free.

    `::` stands for every address of both families, or of the one that this system has. A name may have several
    addresses, of which those that this system does not have are left out. `setting`: where the port comes from. Raises
    UnknownHost and CannotListen.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as e:
        raise UnknownHost(str(getattr(e, "strerror", None) or e)) from None
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for address in dict.fromkeys(info[4][0] for info in found):
        try:
            sockets.append(_bound(str(address), port))
        except OSError as e:
            failure = failure or e
            if e.errno not in _NO_FAMILY:
                break
        else:
            port = sockets[0].getsockname()[1]  # the same one for all
    if failure and host == EVERYWHERE and failure.errno in _NO_FAMILY:
        return bind("0.0.0.0", port, setting=setting)  # noqa: S104  which is what was asked for
    if failure and (not sockets or failure.errno not in _NO_FAMILY):
        for each in sockets:
            each.close()
        raise CannotListen(why(host, port, failure, setting=setting))
    return sockets


def listen(sockets: Sequence[socket.socket], *, backlog: int) -> None:
    """Listen on bound sockets. Raises CannotListen."""
    for each in sockets:
        try:
            each.listen(backlog)
        except OSError as e:  # another process bound it at the same time, and was sooner
            host, port = each.getsockname()[:2]
            raise CannotListen(why(host, port, e)) from None


def urls(sockets: Sequence[socket.socket]) -> list[str]:
    """Return where a client of this machine finds each socket: http://[::]:8000."""
    return [f"http://{address}" for address in addresses(sockets)]


def addresses(sockets: Sequence[socket.socket]) -> list[str]:
    """Return where each socket is bound: [::]:8001."""
    return [_address(*each.getsockname()[:2]) for each in sockets]


def why(host: str, port: int, error: OSError, *, setting: str = "port") -> str:
    """Say why the service cannot listen at an address. `setting`: where the port comes from."""
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error)).format(
        setting=f"{variable(setting)} or {option(setting)}"
    )
    return f"cannot listen at {_address(host, port)}: {reason}"


def _bound(address: str, port: int) -> socket.socket:
    opened = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # where it would let two processes have one port
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if opened.family == socket.AF_INET6:
            # asyncio would set it always, and `::` would not take IPv4
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address != EVERYWHERE))
        opened.bind((address, port))
        opened.setblocking(False)
    except OSError:
        opened.close()
        raise
    return opened


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
