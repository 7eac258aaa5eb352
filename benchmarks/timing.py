"""Timing several ways of doing one thing so that their ratios mean something."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rich.progress import track

from benchmarks.report import progress_console

# Thread pools go on spinning for some milliseconds after their last task, and would take the next way's processors.
SETTLE = 0.1  # seconds

Way = Callable[[], object]


def interleaved(ways: Mapping[str, Way], *, repetitions: int) -> dict[str, list[float]]:
    """Seconds of every way in every repetition; each timed call comes after a pause and an untimed call.

    A repetition runs every way once, in an order that turns from one to the next: what slows the machine for a while
    slows all of them.
    """
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in track(range(repetitions), description="repetitions", console=progress_console, transient=True):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(SETTLE)
            ways[name]()
            began = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> np.ndarray:
    """Seconds of `name` over those of `to`, repetition by repetition."""
    return np.divide(seconds[name], seconds[to])


def spread(values: np.ndarray, *, digits: int = 2) -> str:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
