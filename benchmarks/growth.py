"""Whether the memory of processes grows: straight lines through their resident sizes, with 95 % intervals.

Samples that follow each other within seconds are nearly the same, so an interval from them would be too narrow. So
lines go through the means of whole minutes. What a process takes in its first minutes, while it fills its buffers, is
left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

MINUTE, HOUR = 60.0, 3600.0
_DRAWS = 400_000  # of Student's t: its quantile is then right to half a per cent


@dataclass(frozen=True)
class Sample:
    """The resident size of one process at one time."""

    at: float  # seconds
    pid: int
    role: str
    bytes: float


@dataclass(frozen=True)
class Slope:
    """Bytes per hour, with the bounds of the 95 % interval; not numbers where there are too few minutes."""

    per_hour: float
    low: float
    high: float
    minutes: int  # whose means the line goes through
    processes: int


def lives(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Return the samples of each process, in the order in which the processes came up."""
    ordered = sorted(samples, key=lambda sample: (sample.pid, sample.at))
    found = [list(life) for _, life in groupby(ordered, key=lambda sample: sample.pid)]
    return sorted(found, key=lambda life: life[0].at)


def within(samples: Iterable[Sample], *, warm_up: float) -> Slope:
    """Return the slope that all processes share, each with a level of its own.

    `warm_up`: seconds at the beginning of each life that are left out.
    """
    ages, sizes, used = [], [], 0
    for life in lives(samples):
        age, size = _minutes(life, warm_up=warm_up)
        if len(age) > 1:
            ages.append(age - age.mean())
            sizes.append(size - size.mean())
            used += 1
    return _slope(ages, sizes, levels=used)


def between(samples: Iterable[Sample], *, warm_up: float) -> Slope:
    """Return the slope of the mean sizes of processes over the times at which they came up."""
    begun, sizes = [], []
    for life in lives(samples):
        _, size = _minutes(life, warm_up=warm_up)
        if len(size):
            begun.append(life[0].at)
            sizes.append(size.mean())
    begins, means = np.array(begun), np.array(sizes)
    if not len(begins):
        return _slope([], [], levels=1, processes=0)
    return _slope([begins - begins.mean()], [means - means.mean()], levels=1, processes=len(begins))


def _minutes(life: Sequence[Sample], *, warm_up: float) -> tuple[np.ndarray, np.ndarray]:
    """Return age in seconds and mean size of each whole minute of a life after `warm_up`."""
    age = np.array([sample.at - life[0].at for sample in life])
    size = np.array([sample.bytes for sample in life])
    minute = np.floor((age - warm_up) / MINUTE)
    whole = [number for number in np.unique(minute[minute >= 0]) if warm_up + (number + 1) * MINUTE <= age[-1] + 10]
    return (
        np.array([age[minute == number].mean() for number in whole]),
        np.array([size[minute == number].mean() for number in whole]),
    )


def _slope(
    times: Sequence[np.ndarray], sizes: Sequence[np.ndarray], *, levels: int, processes: int | None = None
) -> Slope:
    """Least squares of centred values. `levels`: how many means were taken away."""
    x = np.concatenate(times) if times else np.zeros(0)
    y = np.concatenate(sizes) if sizes else np.zeros(0)
    processes = levels if processes is None else processes
    free = len(x) - levels - 1
    if free < 1 or not (spread := float((x * x).sum())):
        return Slope(float("nan"), float("nan"), float("nan"), len(x), processes)
    slope = float((x * y).sum()) / spread
    error = float(np.sqrt(((y - slope * x) ** 2).sum() / free / spread))
    t = float(np.quantile(np.random.default_rng(0).standard_t(free, _DRAWS), 0.975))
    return Slope(HOUR * slope, HOUR * (slope - t * error), HOUR * (slope + t * error), len(x), processes)
