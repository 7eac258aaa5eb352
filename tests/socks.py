"""A small SOCKS5 server (RFC 1928, passwords: RFC 1929) that connects to one address, whatever it is asked for."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from socketserver import BaseRequestHandler, ThreadingTCPServer

import httpx

NO_PASSWORD, PASSWORD, NO_METHOD = 0, 2, 255
CONNECTED, HOST_UNREACHABLE = 0, 4
ADDRESS = {1: 4, 4: 16}  # bytes of an IPv4 and of an IPv6 address; a name says its own length


@dataclass
class Socks:
    port: int
    asked: list[tuple[str, int]] = field(default_factory=list)  # hosts and ports that clients wanted
    users: list[tuple[str, str]] = field(default_factory=list)  # and their names and passwords


@contextmanager
def socks_proxy(
    to: str, *, password: str | None = None, reply: int = CONNECTED, instead: bytes | None = None
) -> Iterator[Socks]:
    """A proxy in front of the service at the URL `to`. It asks for `password` if one is given, and answers `reply`.
    `instead`: what it says to a greeting before it hangs up, as a server of another kind would."""
    target = httpx.URL(to)

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            with suppress(ConnectionError):
                self.serve()

        def serve(self) -> None:
            _, methods = self.take(2)
            wanted = NO_PASSWORD if password is None else PASSWORD
            offered = wanted in self.take(methods)
            if instead is not None:
                self.request.sendall(instead)
                return
            self.request.sendall(bytes([5, wanted if offered else NO_METHOD]))
            if not offered or (password is not None and not self.knows()):
                return
            _, _, _, kind = self.take(4)
            host = self.take(self.take(1)[0] if kind == 3 else ADDRESS[kind])
            (port,) = struct.unpack("!H", self.take(2))
            found.asked.append((host.decode() if kind == 3 else host.hex(), port))
            self.request.sendall(bytes([5, reply, 0, 1, 0, 0, 0, 0, 0, 0]))
            if reply == CONNECTED:
                with socket.create_connection((target.host, target.port)) as service:
                    back = threading.Thread(target=pass_on, args=(service, self.request))
                    back.start()
                    pass_on(self.request, service)
                    back.join()

        def knows(self) -> bool:
            _, size = self.take(2)
            user = self.take(size).decode()
            found.users.append((user, self.take(self.take(1)[0]).decode()))
            right = found.users[-1][1] == password
            self.request.sendall(bytes([1, not right]))
            return right

        def take(self, size: int) -> bytes:
            data = b""
            while len(data) < size:
                if not (more := self.request.recv(size - len(data))):
                    raise ConnectionResetError
                data += more
            return data

    class Listener(ThreadingTCPServer):
        daemon_threads = True

    with Listener(("127.0.0.1", 0), Handler) as listener:
        found = Socks(listener.server_address[1])
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield found
        finally:
            listener.shutdown()
            thread.join()


def pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
