"""The processors that this process may use, and who gives way to whom on them."""

from __future__ import annotations

import os
import re
import sys
import threading
from pathlib import Path

# Beside 32 robust connections on two processors, the p99 of the fast path was 5 rounds above its own without, 2 to 3
# with 5, and no better with 15 (benchmarks/service.py).
LESS = 5
DOT_PRODUCTS = frozenset(("avx_vnni", "avx512_vnni", "amx_int8", "asimddp"))  # as Linux calls them


def give_way() -> None:
    """Make the calling thread, and those that it starts from now on, nicer than the rest of the process.

    This needs no privilege, and cannot be undone without one. Only Linux has priorities of single threads; elsewhere
    nothing happens.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + LESS)  # capped at 19


def multiplies_bytes(told: Path = Path("/proc/cpuinfo")) -> bool:
    """Tell whether the processors have instructions for dot products of 8-bit numbers (VNNI, AMX, Arm's dotprod).

    Linux says so in `told`. Elsewhere the answer is no.
    """
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", told.read_text(), re.MULTILINE)
    except OSError:
        return False
    return flags is not None and not DOT_PRODUCTS.isdisjoint(flags[1].split())


def usable_cpus() -> int:
    """Count the processors that this process may use: its affinity mask, bounded further by the cgroup's CPU quota.

    Where the system has neither, as on macOS, that is all of them.
    """
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return allowed
