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


@contextmanager
def running(
    module: str,
    *arguments: str,
    ready: str,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
    written: Path | None = None,
) -> Iterator[Server]:
    """Run `python -m module` in a process group of its own, from the first 200 of `ready` to the end of the block.

    "{port}" in arguments and environment becomes `port`, which is a free one if none is given. What the process writes
    is appended to the file `written`. The group ends with this process too, however that ends. Raises ServerError.
    """
    port = free_port() if port is None else port
    command = [sys.executable, "-m", module, *(argument.format(port=port) for argument in arguments)]
    inherited = {name: value for name, value in os.environ.items() if name != "CARSO_DATA"}  # which is for benchmarks
    given = {name: value.format(port=port) for name, value in (environment or {}).items()}
    with written.open("ab+") if written else tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env={**inherited, **given}, stdout=output, stderr=output, start_new_session=True
        )
        with _watch(process.pid) as watcher:
            try:
                _wait(f"http://127.0.0.1:{port}{ready}", process, command)
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
        for child in map(int, children.read_text().split()):
            found += [child, *_descendants(child)]
    return found


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
