"""How much memory a server holds, on the host and on the GPUs, and how fast that grows."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from benchmarks.servers import Server

MB = 2**20
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Held:
    """Memory at one moment."""

    at: float  # seconds, on the clock of time.monotonic
    host: float  # MB resident, of all processes of the server; pages that they share count for each
    device: float | None  # MB in use on all GPUs, by whomever; None: there is no nvidia-smi


def held(server: Server) -> Held:
    """Return what `server` holds now."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in server.pids)
    used = nvidia_smi("memory.used")
    return Held(time.monotonic(), pages * _PAGE / MB, sum(map(float, used)) if used else None)


def nvidia_smi(query: str) -> list[str]:
    """Return the answer of nvidia-smi, a line for each GPU, without units; nothing if it is not there."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return asked.stdout.splitlines() if asked.returncode == 0 else []


class Watch:
    """Looks at a server again and again, in a thread, as long as the block lasts."""

    def __init__(self, server: Server, *, every: float) -> None:
        """`every`: seconds from one look to the next."""
        self.seen: list[Held] = []
        self._server = server
        self._every = every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        self.seen.append(held(self._server))
        while not self._over.wait(self._every):
            self.seen.append(held(self._server))
        self.seen.append(held(self._server))


def growth(at: Sequence[float], megabytes: Sequence[float]) -> float:
    """Return the slope of a line through all looks (least squares), in MB a minute. `at` is in seconds."""
    times = np.asarray(at) - at[0]
    return 60 * float(np.polyfit(times, megabytes, 1)[0])
