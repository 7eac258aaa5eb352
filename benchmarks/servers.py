"""The servers under test: real processes on free ports, what they report, and the processor time that they take."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

START = 120.0  # seconds
STOP = 20.0
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*(?:\{.*\})?) (\S+)$", re.MULTILINE)
_TICK = os.sysconf("SC_CLK_TCK")


class ServerError(Exception):
    """A server that did not start; the message has what it wrote."""


@dataclass(frozen=True)
class Processors:
    """Seconds of processor time so far."""

    main_thread: float  # where the event loop runs
    others: float  # all other threads, and child processes

    def __sub__(self, earlier: Processors) -> Processors:
        return Processors(self.main_thread - earlier.main_thread, self.others - earlier.others)


@dataclass(frozen=True)
class Server:
    port: int
    pid: int

    @property
    def pids(self) -> tuple[int, ...]:
        """Its process, and all that come of it."""
        return (self.pid, *_descendants(self.pid))

    def processors(self) -> Processors:
        main = others = 0.0
        for pid in self.pids:
            for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
                user, system = stat.read_text().rpartition(") ")[2].split()[11:13]
                seconds = (int(user) + int(system)) / _TICK
                if stat.parent.name == str(self.pid):
                    main += seconds
                else:
                    others += seconds
        return Processors(main, others)

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, by its name with labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            return {name: float(value) for name, value in _SAMPLE.findall(answer.read().decode())}


def running(
    module: str,
    *arguments: str,
    ready: str,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
    written: Path | None = None,
) -> AbstractContextManager[Server]:
    """Run `python -m module` as `started` does, with this process's environment beside the one given."""
    inherited = {name: value for name, value in os.environ.items() if name != "CARSO_DATA"}  # which is for benchmarks
    return started(
        [sys.executable, "-m", module, *arguments],
        ready=ready,
        environment=inherited | dict(environment or {}),
        port=port,
        written=written,
    )


@contextmanager
def started(
    command: Sequence[str],
    *,
    ready: str,
    environment: Mapping[str, str],
    port: int | None = None,
    written: Path | None = None,
    folder: Path | None = None,
) -> Iterator[Server]:
    """Run a command in a process group of its own, from the first 200 of `ready` to the end of the block.

    `port` is a free one if none is given. "{port}" in `command` becomes it, and so does a value of `environment` that
    is "{port}". What the process writes is appended to the file `written`. `folder`: where it runs, if not here. The
    group ends with this process too, however that ends. Raises ServerError.
    """
    port = free_port() if port is None else port
    filled = [part.format(port=port) for part in command]
    given = {name: value.format(port=port) if value == "{port}" else value for name, value in environment.items()}
    with written.open("ab+") if written else tempfile.TemporaryFile() as output:
        process = subprocess.Popen(filled, env=given, stdout=output, stderr=output, start_new_session=True, cwd=folder)
        with _watch(process.pid) as watcher:
            try:
                _wait(f"http://127.0.0.1:{port}{ready}", process, filled)
                yield Server(port, process.pid)
            except ServerError as e:
                output.seek(0)
                raise ServerError(f"{e}:\n{output.read().decode(errors='replace')}") from None
            finally:
                _stop(process)
                watcher.kill()


def carso(
    bundle: Path, *, port: int | None = None, written: Path | None = None, **settings: str
) -> AbstractContextManager[Server]:
    """Run the service itself, with its own defaults but for what the environment and `settings` say."""
    environment = {"CARSO_BUNDLE": str(bundle), "CARSO_PORT": "{port}", **settings}
    return running("carso.command", "serve", ready="/readyz", environment=environment, port=port, written=written)


def _wait(url: str, process: subprocess.Popen[bytes], command: Sequence[str]) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ServerError(f"{' '.join(command)} ended with {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=1):  # noqa: S310
                return
        except OSError:
            time.sleep(0.1)
    raise ServerError(f"{' '.join(command)} was not ready within {START:.0f} s")


def _watch(group: int) -> subprocess.Popen[bytes]:
    """Start a process that ends a process group once this process is gone, whatever ended it: then its pipe closes."""
    script = f"read -r _; kill -s TERM -- -{group}; sleep {STOP:.0f}; kill -s KILL -- -{group}"
    return subprocess.Popen(
        ["/bin/sh", "-c", script], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(STOP)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            read = children.read_text()
        except OSError:  # the thread has just ended
            continue
        for child in map(int, read.split()):
            found += [child, *_descendants(child)]
    return found


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
