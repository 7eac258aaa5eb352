"""Threads that compute give way to the event loop, which has little to do and should not wait for it."""

from __future__ import annotations

import os
import sys
import threading

# Beside 32 robust connections on two processors, the p99 of the fast path was 5 rounds above its own without, 2 to 3
# with 5, and no better with 15 (benchmarks/service.py).
LESS = 5


def give_way() -> None:
    """Make the calling thread, and those that it starts from now on, nicer than the rest of the process.

    Needs no privilege, and cannot be taken back without one. Only Linux has priorities of single threads; elsewhere
    nothing is done.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + LESS)  # capped at 19
