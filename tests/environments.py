"""Environments of their own for packages that pin other versions than this project. pip takes them from the index."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import venv
from pathlib import Path

from tests.server import ROOT

CACHE = ROOT / ".pytest_cache" / "sdks"


def python_with(package: str, *others: str) -> Path:
    """The interpreter of an environment that holds one package, and others with it, which is kept for later runs."""
    folder = CACHE / f"{package}-{sys.version_info.major}.{sys.version_info.minor}"
    interpreter = folder / "bin" / "python"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            venv.create(folder, with_pip=True, clear=True)
            command = [interpreter, "-m", "pip", "install", "--quiet", "--no-compile", package, *others]
            subprocess.run(command, check=True)
            (folder / "complete").touch()
    return interpreter
