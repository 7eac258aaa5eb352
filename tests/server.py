"""A real server process on a real port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_WITHIN = 120  # seconds: test machines may be busy


@dataclass(frozen=True)
class Server:
    url: str
    log: Path  # what it wrote to standard error
    process: subprocess.Popen[bytes]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)

    def connect(self, *, timeout: float) -> socket.socket:
        address = httpx.URL(self.url)
        return socket.create_connection((address.host, address.port), timeout=timeout)


def environment(**settings: object) -> dict[str, str]:
    """This process's environment with these settings of the service and no others."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CARSO_")}
    return inherited | {f"CARSO_{name.upper()}": str(value) for name, value in settings.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(
    bundle: Path, log: Path, *, program: Sequence[str] = ("-m", "carso.command", "serve"), **settings: object
) -> Iterator[Server]:
    """A server that is ready; it is stopped at the end. `program`: arguments of Python."""
    port = free_port()
    settings = {"bundle": bundle, "port": port, "device": "cpu", "threads": 1, **settings}
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, *program], env=environment(**settings), stderr=stderr)
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait(server)
        yield server
    finally:
        process.terminate()
        process.wait(30)


def _wait(server: Server) -> None:
    give_up = time.monotonic() + START_WITHIN
    while time.monotonic() < give_up:
        if server.process.poll() is not None:
            break
        try:
            if httpx.get(f"{server.url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the server is not ready:\n{server.log.read_text()}")
