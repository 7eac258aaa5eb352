"""Which signals a process takes care of, so that a test can send one at the right moment."""

from __future__ import annotations

import re
from pathlib import Path


def catches(process: int, signal: int) -> bool:
    """Whether `process`, by its id, has a handler of its own for `signal`."""
    status = Path(f"/proc/{process}/status").read_text()
    caught = re.search(r"^SigCgt:\s+(\w+)", status, re.MULTILINE)[1]
    return bool(int(caught, 16) >> signal - 1 & 1)
