"""A real server process on a real port, which the system chooses."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[1]
SPEED = os.environ.get("TEST_VOTE_SPEED", "")  # fast or slow: tests/paced.py says what for
COMMAND = ("-m", "carso.command", "serve")
LISTENING = re.compile(r"(http://127\.0\.0\.1:\d+)")


@dataclass(frozen=True)
class Server:
    url: str
    log: Path  # what it wrote to standard error
    process: subprocess.Popen[bytes]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE)

    def connect(self) -> socket.socket:
        address = httpx.URL(self.url)
        return socket.create_connection((address.host, address.port), timeout=PATIENCE)

    def metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text

    def leaves(self) -> int:
        """Wait for its end; its exit status."""
        return self.process.wait(PATIENCE)


def environment(**settings: object) -> dict[str, str]:
    """This process's environment with these settings of the service and no others."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CARSO_")}
    return inherited | {f"CARSO_{name.upper()}": str(value) for name, value in settings.items()}


def program(*, per_second: float = 0, failing: bool = False, cuda: bool = False) -> tuple[str, ...]:
    """Arguments of Python that start the service. With options, or at another vote speed: tests/paced.py has them."""
    if not (per_second or failing or cuda or SPEED):
        return COMMAND
    asked = ["--speed", SPEED, "--per-second", str(per_second)]
    asked += [f"--{name}" for name, given in (("failing", failing), ("cuda", cuda)) if given]
    return ("-m", "tests.paced", *asked, "serve")


@contextmanager
def serving(
    bundle: Path, log: Path, *, per_second: float = 0, failing: bool = False, cuda: bool = False, **settings: object
) -> Iterator[Server]:
    """A server that is ready; it is stopped at the end. `per_second`, `failing` and `cuda` are options of
    tests/paced.py.
    """
    arguments = [sys.executable, *program(per_second=per_second, failing=failing, cuda=cuda)]
    settings = {"bundle": bundle.absolute(), "port": 0, "device": "cpu", "threads": 1, **settings}
    with log.open("wb") as stderr:
        process = subprocess.Popen(arguments, env=environment(**settings), stderr=stderr, cwd=ROOT)
    with _ended_with_us(process):
        try:
            yield _ready(process, log)
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise


@contextmanager
def _ended_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End `process` even if the tests are killed: a shell waits for the end of a pipe that only this process holds."""
    script = f"read -r _; kill {process.pid}"
    with subprocess.Popen(["/bin/sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True) as watcher:
        try:
            yield
        finally:
            watcher.kill()


def _ready(process: subprocess.Popen[bytes], log: Path) -> Server:
    give_up = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < give_up:
        with suppress(httpx.TransportError):
            if (url := _address(process, log)) and httpx.get(f"{url}/readyz", timeout=PATIENCE).status_code == 200:
                return Server(url, log, process)
        time.sleep(0.02)
    raise RuntimeError(f"the server is not ready:\n{log.read_text() if log.is_file() else log}")


def _address(process: subprocess.Popen[bytes], log: Path) -> str | None:
    """Where it listens; None: nowhere yet. As its log says; where that is no file, as the kernel does."""
    if log.is_file():
        told = LISTENING.search(log.read_text())
        return told and told[1]
    with suppress(FileNotFoundError):
        inodes = {fd.readlink().name for fd in Path(f"/proc/{process.pid}/fd").iterdir() if fd.is_symlink()}
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in inodes:  # it listens
                return f"http://127.0.0.1:{int(local.partition(':')[2], 16)}"
    return None


@contextmanager
def silent_port() -> Iterator[socket.socket]:
    """A socket on a port of its own that nobody listens on: connections are refused, and no other process gets it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound


def url_of(bound: socket.socket) -> str:
    return f"http://127.0.0.1:{bound.getsockname()[1]}"
